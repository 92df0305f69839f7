"""The network, its averages, and its exchange with other software."""

from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.nets.dropout import DropoutKeys
from ddpm_pipeline.nets.ema import ConstantEMA, PowerEMA, WeightAverage
from ddpm_pipeline.nets.unet import UNet, parameter_count, seeded_init

__all__ = [
    "ConstantEMA",
    "DropoutKeys",
    "PowerEMA",
    "UNet",
    "UNetConfig",
    "WeightAverage",
    "parameter_count",
    "seeded_init",
]
