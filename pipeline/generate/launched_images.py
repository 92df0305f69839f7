"""Images that a device was asked for, and their way to the host while it works on the next ones."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.generate.guards import GuardTripped


@dataclass(frozen=True)
class MicroBatch:
    """Samples computed at a time. On a GPU their values are there after `copied`."""

    index: Tensor
    """int64 (B,)."""
    levels: Tensor
    """uint8 (B, C, H, W), on the host."""
    finite: Tensor
    """bool (B,), on the host: the sample holds neither NaN nor infinity."""
    copied: torch.cuda.Event | None = None
    """The end of the copies; None where there was nothing to copy."""

    def wait(self) -> Tensor:
        """Wait for the copies; returns `levels`. GuardTripped at NaN or infinity."""
        if self.copied is not None:
            self.copied.synchronize()
        if not self.finite.all():
            bad = self.index[~self.finite]
            raise GuardTripped(f"sample {int(bad[0])} holds NaN or infinity ({len(bad)} of its batch do)")
        return self.levels


class LaunchedImages:
    """The images of a batch. On a GPU they may still be computed when this is made."""

    def __init__(self, parts: list[MicroBatch]) -> None:
        """`parts` are in the order of the batch."""
        self._parts = parts

    def wait(self) -> Pixels:
        """The images uint8 (B, H, W, C), in memory that is not pinned. GuardTripped at NaN or infinity."""
        levels = torch.cat([part.wait() for part in self._parts])
        return np.ascontiguousarray(levels.permute(0, 2, 3, 1).numpy())


class HostCopier:
    """Copies results to the host: those of a GPU into pinned memory, on a stream beside the one that computes."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def begin(self, index: Tensor, levels: Tensor, finite: Tensor) -> MicroBatch:
        """Begin to copy `levels` uint8 (B, C, H, W) and `finite` bool (B,) of the samples `index`, on the host.

        Waits for nothing. The caller may drop its tensors at once.
        """
        if levels.device.type != "cuda":
            return MicroBatch(index, levels, finite)
        self._stream = stream = self._stream or torch.cuda.Stream(levels.device)
        stream.wait_stream(torch.cuda.current_stream(levels.device))
        with torch.cuda.stream(stream):
            copies = [tensor.to("cpu", non_blocking=True) for tensor in (levels, finite)]  # pinned by torch
            copied = torch.cuda.Event(blocking=True)
            copied.record(stream)
        for tensor in (levels, finite):
            tensor.record_stream(stream)  # its memory is not used again before it is copied
        return MicroBatch(index, copies[0], copies[1], copied)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, without waiting for what the device does."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
