"""Between the bytes of an image and the numbers of the model."""

import torch
from torch import Tensor

from ddpm_pipeline.devices import divided


def from_uint8(images: Tensor) -> Tensor:
    """uint8 levels 0..255 to float32 in [-1, 1]: u / 127.5 - 1. Any shape.

    Raises: ValueError naming images for another dtype.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}")
    return divided(images.to(torch.float32), 127.5) - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Float [-1, 1] to uint8: x * 127.5 + 128, cut to 0..255 and truncated, which rounds to the nearest
    level.

    Values outside are clipped; the inverse of `from_uint8` for every level. Any shape.
    Raises: ValueError naming images for integers, or for NaN, which has no level.
    """
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point, not {images.dtype}")
    if bool(images.isnan().any()):
        raise ValueError("images holds NaN, which no pixel level stands for")
    return nearest_levels(images)


def nearest_levels(images: Tensor) -> Tensor:
    """What `to_uint8` returns, for callers that know that no value is NaN: looking would wait for a GPU."""
    scaled = images.to(torch.float32) * 127.5 + 128.0
    return scaled.clamp(0.0, 255.0).to(torch.uint8)
