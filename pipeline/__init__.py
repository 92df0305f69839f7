"""Denoising diffusion as a pipeline: maths, networks, data, tracking, and what runs on the cluster.

The sub-packages are layers; each imports only what stands below it (see docs/architecture.md).
"""

__version__ = "0.1.0"
