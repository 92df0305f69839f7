"""What a training needs, known before it begins: parameters, arithmetic and memory.

The network runs once on torch's meta device, where operations have shapes and no numbers: that takes a second, no
data and no memory, and depends on nothing but the settings.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.net import UNetConfig
from pipeline.config.training import TrainConfig
from pipeline.nets import DropoutKeys, UNet, parameter_count

FLOAT32_BYTES = 4
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Memory:
    """Bytes that one worker holds between two steps, all of them in float32."""

    weights: int
    gradients: int
    """Twice where several workers average them: DDP sends them from buckets of its own."""
    optimizer: int
    """Adam's two moments."""
    averages: int

    @property
    def total(self) -> int:
        """All of these."""
        return self.weights + self.gradients + self.optimizer + self.averages


def state_memory(config: TrainConfig) -> Memory:
    """Memory of the training's state, whatever the batch."""
    with torch.device("meta"):
        one = parameter_count(UNet(config.net)) * FLOAT32_BYTES
    averages = len(config.ema.widths) if config.ema.kind == "power" else 1
    return Memory(one, one * (2 if config.workers.most > 1 else 1), 2 * one, averages * one)


def activation_bytes(net: UNetConfig, precision: Precision) -> int:
    """Bytes that the backward pass of one sample needs kept from the forward pass: every saved tensor once.

    Attention counts as if it kept its matrix, which fused kernels do not: for DDPM's CIFAR-10 network 8% too much.
    """
    network, x, t, labels, dropout = _on_meta(net, precision)
    own = {id(parameter.untyped_storage()) for parameter in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage  # held, or its identity could be given to the next one
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        network(x, t, class_labels=labels, dropout=dropout).float().square().mean()
    return sum(storage.nbytes() for storage in kept.values())


def sample_flops(net: UNetConfig) -> int:
    """Floating-point operations of one sample's forward and backward pass: convolutions and matrix products."""
    network, x, t, labels, dropout = _on_meta(net, "float32")
    with FlopCounterMode(display=False) as counter:
        network(x, t, class_labels=labels, dropout=dropout).square().mean().backward()
    return int(counter.get_total_flops())


def _on_meta(
    net: UNetConfig, precision: Precision
) -> tuple[UNet, Tensor, Tensor, Tensor | None, DropoutKeys | None]:
    """The network and one sample of everything it is told. Autocast knows no meta device: all is in `precision`."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with torch.device("meta"):
        network = UNet(net).train().to(dtype)
        x = torch.empty(1, net.in_channels, net.image_size, net.image_size, dtype=dtype)
        number = torch.zeros(1, dtype=torch.int64)
        dropout = DropoutKeys(0, number) if net.dropout else None
    return network, x, number, number if net.num_classes is not None else None, dropout
