"""Copies of a training's tensors on the host, made without making the training wait."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes; a multiple of the size of every dtype's elements."""


@dataclass(frozen=True)
class Staged:
    """Copies on the host, in row-major order. Their values are there after `wait`."""

    tensors: dict[str, Tensor]
    copied: torch.cuda.Event | None = None
    """On the GPU, the end of the copies; None where nothing was on a GPU."""

    def wait(self) -> None:
        """Wait for the copies."""
        if self.copied is not None:
            self.copied.synchronize()


class Staging:
    """Copies tensors to the host: those of a GPU on a stream of its own, into one pinned buffer.

    The buffer is kept from one call to the next, as pinning takes long: a call overwrites the copies of the one before.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._stream: torch.cuda.Stream | None = None

    def copy(self, tensors: Mapping[str, Tensor]) -> Staged:
        """Copies of all tensors, whose memory may change on the CPU at once, and on a GPU after `Staged.copied`."""
        on_gpu = {name: tensor for name, tensor in tensors.items() if tensor.device.type == "cuda"}
        copies = self._copy_from_gpu(on_gpu) if on_gpu else Staged({})
        staged = {
            # safetensors requires row-major order; channels_last is a layout, not a value
            name: copies.tensors[name]
            if name in on_gpu
            else tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        return Staged(staged, copies.copied)

    def _copy_from_gpu(self, tensors: Mapping[str, Tensor]) -> Staged:
        device = next(iter(tensors.values())).device
        self._stream = stream = self._stream or torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        places = self._places(tensors)
        with torch.cuda.stream(stream):
            for name, tensor in tensors.items():
                tensor.record_stream(stream)  # if the training frees it, its memory is not used again before
                places[name].copy_(tensor.detach().contiguous(), non_blocking=True)
            copied = torch.cuda.Event(blocking=True)
            copied.record(stream)
        return Staged(places, copied)

    def _places(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """For each tensor an uninitialized one in the buffer."""
        ends: list[int] = []
        for tensor in tensors.values():
            size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            ends.append((ends[-1] if ends else 0) + size)
        if len(self._buffer) < ends[-1]:
            self._buffer = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
        places: dict[str, Tensor] = {}
        for (name, tensor), begin in zip(tensors.items(), [0, *ends], strict=False):
            flat = self._buffer[begin : begin + tensor.nbytes]
            places[name] = flat.view(tensor.dtype).view(tensor.shape)
        return places
