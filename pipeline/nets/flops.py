"""Floating-point operations of a network, counted by running it on the meta device: no data, no memory, a second."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_pipeline.config.net import NetConfig
from ddpm_pipeline.nets.build import build_net
from ddpm_pipeline.nets.dropout import DropoutKeys


def sample_flops(net: NetConfig) -> int:
    """Operations of one sample's forward and backward pass: convolutions and matrix products."""
    network, x, t, labels, dropout = on_meta(net, torch.float32)
    with FlopCounterMode(display=False) as counter:
        network(x, t, **given_conditions(labels, dropout)).square().mean().backward()
    return int(counter.get_total_flops())


def forward_flops(net: NetConfig) -> int:
    """Operations of one sample's forward pass."""
    network, x, t, labels, _ = on_meta(net, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(x, t, **given_conditions(labels))
    return int(counter.get_total_flops())


def on_meta(
    net: NetConfig, dtype: torch.dtype
) -> tuple[nn.Module, Tensor, Tensor, Tensor | None, DropoutKeys | None]:
    """The network and one sample of each input. Autocast does not support the meta device: all is of `dtype`."""
    with torch.device("meta"):
        network = build_net(net).train().to(dtype)
        x = torch.empty(1, net.in_channels, net.image_size, net.image_size, dtype=dtype)
        number = torch.zeros(1, dtype=torch.int64)
        dropout = DropoutKeys(0, number) if net.dropout else None
    return network, x, number, number if net.num_classes is not None else None, dropout


def given_conditions(class_labels: Tensor | None, dropout: DropoutKeys | None = None) -> dict[str, object]:
    """Labels and dropout keys as a network is passed them: by keyword, and only where there are any."""
    conditions = {"class_labels": class_labels, "dropout": dropout}
    return {name: value for name, value in conditions.items() if value is not None}
