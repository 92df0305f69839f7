"""What this process's devices are, and how they compute."""

from ddpm_pipeline.devices.arithmetic import set_up_arithmetic
from ddpm_pipeline.devices.cuda_device import driver_version, read_device_kind
from ddpm_pipeline.devices.division import divided
from ddpm_pipeline.devices.out_of_memory import is_out_of_memory
from ddpm_pipeline.devices.shared_gpu import is_context_lost, limit_memory

__all__ = [
    "divided",
    "driver_version",
    "is_context_lost",
    "is_out_of_memory",
    "limit_memory",
    "read_device_kind",
    "set_up_arithmetic",
]
