"""Earlier name of `image_scaling`, which the code stored beside models registered by version 0.1.0 imports."""

from ddpm_pipeline.diffusion.image_scaling import to_uint8

__all__ = ["to_uint8"]
