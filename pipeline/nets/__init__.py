"""The network, its averages, and its exchange with other software."""

from ddpm_pipeline.config.net import NetConfig, UNetConfig
from ddpm_pipeline.nets.build import build_net, parameter_count, seeded_init
from ddpm_pipeline.nets.dropout import DropoutKeys
from ddpm_pipeline.nets.ema import ConstantEMA, PowerEMA, WeightAverage
from ddpm_pipeline.nets.unet import UNet

__all__ = [
    "ConstantEMA",
    "DropoutKeys",
    "NetConfig",
    "PowerEMA",
    "UNet",
    "UNetConfig",
    "WeightAverage",
    "build_net",
    "parameter_count",
    "seeded_init",
]
