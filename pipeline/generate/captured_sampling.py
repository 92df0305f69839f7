"""A whole sampling of a batch as one CUDA graph: the host launches it at once instead of each of its kernels."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.devices.cuda_graph import CapturedWork, capture
from ddpm_pipeline.diffusion.evaluations import network_calls
from ddpm_pipeline.generate.launched_images import to_device

MOST_CALLS = 64
"""Calls of the network in one graph, which keeps some kilobytes for each kernel: a call starts some hundred."""

Sampling = Callable[[Tensor, Tensor | None], Tensor]
"""From indexes int64 (B,) and labels int64 (B,), or None, both on the device, to images float32 (B, C, H, W)."""


class CapturedSampling:
    """Runs a sampling as it is for the first batch of a size, then captures it, and replays it for all later ones.

    The kernels and their order are the same either way, and so are the bits. Not thread-safe.
    """

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        """`sampling`: waits for nothing, copies nothing from the host, and reads nothing from it that changes."""
        self._sampling = sampling
        self._device = device
        self._size = 0
        self._warm_threads: set[int] = set()
        self._graph: _Graph | None = None
        self._may_capture = True

    @property
    def is_captured(self) -> bool:
        """Whether the next batch of the same size is a replay."""
        return self._graph is not None

    def __call__(self, index: Tensor, labels: Tensor | None) -> Tensor:
        """Images float32 (B, C, H, W) of `index` and `labels`, which are on the host. In inference mode.

        The next call on this stream may write over the result.
        """
        if len(index) != self._size:
            self._size, self._graph, self._warm_threads = len(index), None, set()
        if self._graph is None and self._may_capture and threading.get_ident() in self._warm_threads:
            self._graph = self._capture(index, labels)
        if self._graph is not None:
            return self._graph.replay(index, labels)
        images = self._sampling(
            to_device(index, self._device), None if labels is None else to_device(labels, self._device)
        )
        # Triton's kernels are compiled now, and this thread has handles of cuBLAS and cuDNN: no capture may make them.
        self._warm_threads.add(threading.get_ident())
        return images

    def release(self) -> bool:
        """Give up the graph, if there is one, with its memory, and capture no other; returns whether there was one."""
        if self._graph is None:
            return False
        self._graph, self._may_capture = None, False
        return True

    def _capture(self, index: Tensor, labels: Tensor | None) -> "_Graph | None":
        fixed_index = torch.zeros_like(index, device=self._device)
        fixed_labels = None if labels is None else torch.zeros_like(labels, device=self._device)
        work = capture(
            lambda: self._sampling(fixed_index, fixed_labels),
            self._device,
            "images are sampled without a CUDA graph, which may take longer",
        )
        self._may_capture = work is not None
        return None if work is None else _Graph(work, fixed_index, fixed_labels)


@dataclass(frozen=True)
class _Graph:
    """A captured sampling with its inputs."""

    work: CapturedWork[Tensor]
    index: Tensor
    labels: Tensor | None

    def replay(self, index: Tensor, labels: Tensor | None) -> Tensor:
        for target, values in ((self.index, index), (self.labels, labels)):
            if target is not None and values is not None:
                target.copy_(values.pin_memory(), non_blocking=True)
        return self.work.replay()


def can_capture(sampler: SamplerConfig, device: torch.device, compiled: bool) -> bool:
    """Whether a sampling is worth a graph, and may run in one. `compiled`: torch.compile compiles the network."""
    if device.type != "cuda" or compiled or network_calls(sampler) > MOST_CALLS:
        return False
    return sampler.definition.capturable
