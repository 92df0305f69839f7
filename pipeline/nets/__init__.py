"""The network, its averages, and its exchange with other software."""

from pipeline.config.net import UNetConfig
from pipeline.nets.dropout import DropoutKeys
from pipeline.nets.ema import ConstantEMA, PowerEMA, WeightAverage
from pipeline.nets.unet import UNet, parameter_count, seeded_init

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
