"""Pure maths of diffusion over an immutable schedule: no hidden state, no I/O."""

from ddpm_pipeline.diffusion.image_scaling import from_uint8, to_uint8
from ddpm_pipeline.diffusion.noise import Stream
from ddpm_pipeline.diffusion.objective import LossTerms, training_loss
from ddpm_pipeline.diffusion.sampler_protocol import SamplerStep
from ddpm_pipeline.diffusion.samplers import sample
from ddpm_pipeline.diffusion.schedule import NoiseSchedule

__all__ = [
    "LossTerms",
    "NoiseSchedule",
    "SamplerStep",
    "Stream",
    "from_uint8",
    "sample",
    "to_uint8",
    "training_loss",
]
