"""Whether this process's device is of the kind that a generation's bytes are promised for."""

import torch

from ddpm_pipeline.config.device_kind import DeviceKind
from ddpm_pipeline.devices import read_device_kind
from ddpm_pipeline.devices.remedies import fault_and_remedy
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.spec import Spec


class UnfitDevice(UserError):  # noqa: N818 - the fact is the name
    """No GPU at hand can make this generation's bytes: each is of another kind, or torch cannot use it."""


def usable_kind(device: torch.device) -> DeviceKind | None:
    """The kind of a device; None for a CPU. UnfitDevice if torch cannot use it."""
    try:
        return read_device_kind(device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        fault, remedy = fault_and_remedy(error)
        raise UnfitDevice(f"the GPU cannot be used ({fault}); {remedy}") from error


def require_kind(spec: Spec) -> None:
    """UnfitDevice unless this process computes as the spec says. A spec that fixes no kind accepts any."""
    found = usable_kind(torch.device(spec.device))
    if spec.device_kind is not None and found != spec.device_kind:
        raise UnfitDevice(other_kind(spec.device_kind, found))


def other_kind(wanted: DeviceKind, found: DeviceKind | None) -> str:
    """Why a device of the kind `found` (None: a CPU) makes nothing of a generation of the kind `wanted`."""
    return (
        f"device: the generation is of {wanted}, and this is {found or 'a CPU'}, which rounds differently; use GPUs "
        "and software of that kind, or another output prefix"
    )
