"""Denoising diffusion as a pipeline: maths, networks, data, tracking, and what runs on the cluster.

`ddpm_pipeline.api` is the library for programs; it is imported when it is first used. The sub-packages are layers; each
imports only what stands below it (see docs/architecture.md).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_pipeline import api

__all__ = ["__version__", "api"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name == "api":
        from importlib import import_module

        return import_module("ddpm_pipeline.api")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
