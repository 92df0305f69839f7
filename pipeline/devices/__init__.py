"""What this process's devices are, and how they compute."""

from pipeline.devices.arithmetic import set_up_arithmetic
from pipeline.devices.cuda_device import driver_version, read_device_kind
from pipeline.devices.division import divided
from pipeline.devices.out_of_memory import is_out_of_memory
from pipeline.devices.shared_gpu import is_context_lost, limit_memory

__all__ = [
    "divided",
    "driver_version",
    "is_context_lost",
    "is_out_of_memory",
    "limit_memory",
    "read_device_kind",
    "set_up_arithmetic",
]
