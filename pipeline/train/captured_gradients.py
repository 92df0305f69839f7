"""The forward and backward passes of a training step as one CUDA graph.

A step of a small network is a thousand kernels of some microseconds, which the host launches more slowly than a GPU
runs them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.reading.loader import Batch
from ddpm_pipeline.devices.cuda_graph import CapturedWork, capture
from ddpm_pipeline.nets import UNetConfig

WARM_STEPS = 3
"""Steps before the capture: kernels are compiled and chosen, handles of libraries made."""

Losses = list[tuple[Tensor, Tensor]]
"""Per-sample losses (n,) and timesteps (n,) of each micro-batch."""
Passes = Callable[[Batch], Losses]
"""The passes for a batch: they leave the parameters their gradients."""


class CapturedGradients:
    """Runs the passes as they are for the first steps, then captures them, and replays them for all later ones.

    The kernels and their order are the same either way, and so are the bits.
    """

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        """`net`: whose parameters get gradients; they stay where they are."""
        self._parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self._device = device
        self._warm_steps = 0
        self._graph: _Graph | None = None
        self._may_capture = True

    @property
    def is_captured(self) -> bool:
        """Whether the next step is a replay."""
        return self._graph is not None

    def __call__(self, batch: Batch, passes: Passes) -> Losses:
        """What `passes` gives, which gets batches of one shape. The next call writes over it and over the gradients.

        The parameters have no gradients before.
        """
        if self._graph is None and self._may_capture and self._warm_steps >= WARM_STEPS:
            self._capture(batch, passes)
        if self._graph is not None:
            return self._graph.replay(batch)
        self._warm_steps += 1
        return passes(batch)

    def make_room(self, usable_bytes: int) -> None:
        """Give up the graph, until the next step, if other work would find less memory than the graph holds.

        usable_bytes: what this process may take of the GPU's memory.
        """
        if self._graph is None:
            return
        if usable_bytes - torch.cuda.memory_reserved(self._device) < self._graph.bytes:
            self._graph = None
            torch.cuda.empty_cache()

    def _capture(self, batch: Batch, passes: Passes) -> None:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device)
        inputs = batch.map(lambda tensor: tensor.to(self._device, copy=True))
        work = capture(
            lambda: passes(inputs),
            self._device,
            "steps are launched kernel by kernel, not as a CUDA graph, which may take longer",
        )
        gradients = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        self._may_capture = work is not None
        if work is not None:
            held = max(0, torch.cuda.memory_reserved(self._device) - before)
            self._graph = _Graph(work, inputs, self._parameters, gradients, held)


@dataclass(frozen=True)
class _Graph:
    """Captured passes, with their inputs and the gradients that they write."""

    work: CapturedWork[Losses]
    inputs: Batch
    parameters: list[nn.Parameter]
    gradients: list[Tensor | None]
    bytes: int
    """Of the GPU's memory that it keeps."""

    def replay(self, batch: Batch) -> Losses:
        values = batch.tensors()
        for name, fixed in self.inputs.tensors().items():
            fixed.copy_(values[name])
        losses = self.work.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return losses


def captured_gradients(
    config: TrainConfig, net: nn.Module, device: torch.device, world: int
) -> CapturedGradients | None:
    """For the passes of `net`, one of `world` workers' networks; None where they cannot run in a graph.

    A compiled network has graphs of its own, several workers exchange gradients meanwhile, and another package's
    network may read what changes from the host.
    """
    alone = world == 1 and not config.compile
    if device.type != "cuda" or not alone or not isinstance(config.net, UNetConfig):
        return None
    return CapturedGradients(net, device)
