"""The kind of a device: what the bits of a result depend on beside the settings."""

from typing import Literal

from pydantic import Field

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.bounds import Name

Matmul = Literal["ieee", "tf32"]
"""Arithmetic of float32 products and convolutions on a GPU: full float32, or inputs rounded to TF32's 10 bits."""


class DeviceKind(Settings):
    """A model of GPU and the software that chooses its kernels. Two devices of equal kind round alike."""

    name: Name
    """As the driver names it, such as `NVIDIA H100 80GB HBM3`."""
    capability: str = Field(pattern=r"^\d{1,3}\.\d{1,2}$")
    """Compute capability, such as `9.0`."""
    torch: Name
    """Version of torch, with its build, such as `2.13.0+cu130`."""
    cuda: Name
    """Version of CUDA that torch was built with."""
    cudnn: Name
    """Version of cuDNN, which computes convolutions."""
    triton: Name | None = None
    """Version of Triton, whose kernels normalize groups. None: Triton does not run there, so torch's kernels do, which
    round differently."""

    def __str__(self) -> str:
        return (
            f"{self.name} (compute capability {self.capability}; torch {self.torch}, CUDA {self.cuda}, "
            f"cuDNN {self.cudnn}, {f'Triton {self.triton}' if self.triton else 'no Triton'})"
        )
