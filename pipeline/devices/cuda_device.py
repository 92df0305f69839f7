"""The kind of the device that this process computes on."""

from contextlib import suppress

import pynvml
import torch

from ddpm_pipeline.config.device_kind import DeviceKind
from ddpm_pipeline.devices.triton_version import triton_version


def read_device_kind(device: torch.device) -> DeviceKind | None:
    """The kind of a CUDA device; None for a CPU, whose results depend on its threads and the spec alone."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return DeviceKind(
        name=torch.cuda.get_device_name(device),
        capability=f"{major}.{minor}",
        torch=torch.__version__,
        cuda=str(torch.version.cuda),
        cudnn=str(torch.backends.cudnn.version()),
        triton=triton_version(),
    )


def driver_version() -> str:
    """Version of this machine's NVIDIA driver, such as `580.65.06`; `unknown` where NVML does not say."""
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    return "unknown"
