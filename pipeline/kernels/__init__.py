"""Operators that a GPU computes by kernels of our own, written in Triton.

Nothing here imports Triton before the first launch: CPU builds of torch come without it.
"""

from ddpm_pipeline.kernels.operators import define_operator, on_gpu

__all__ = ["define_operator", "on_gpu"]
