"""The kind of the device that this process computes on."""

import torch

from pipeline.config.device_kind import DeviceKind


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
    )
