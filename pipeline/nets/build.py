"""Networks from their settings: the U-Net, or another package's."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import nn

from ddpm_pipeline.config.net import NetConfig, UNetConfig, kind_of
from ddpm_pipeline.config.plugins import NETWORKS, find_plugin, require_plugin
from ddpm_pipeline.errors import UserError


class BuildNetwork(Protocol):
    """What a kind of network does, ours or another package's: a module with fresh parameters.

    The module is called as `net(x, t, class_labels=…, dropout=…)`: noisy images float (B, in_channels, H, W), timesteps
    (B,), whole or fractional, to the prediction (B, out_channels, H, W). Row i of the result follows from row i of the
    arguments. Labels int64 (B,) are passed where `net` has classes; with `null_class` the label `num_classes` means
    none. `dropout`, a `DropoutKeys`, is passed in training where `net.dropout` is above 0, and masks come from it: a
    module that draws from a generator does not resume. Parameters are drawn from torch's global generator, which is
    seeded. The module can be built on torch's meta device, too. settings: of the plug-in's own class.

    A module may have a method `blocks()`: the parts whose weights FSDP collects together. Without it FSDP collects the
    whole network.
    """

    def __call__(self, net: Any, settings: Any, /) -> nn.Module: ...


def build_net(config: NetConfig) -> nn.Module:
    """A network with fresh parameters. UserError unless its package is installed in the version of the settings."""
    if isinstance(config, UNetConfig):
        ours: BuildNetwork = find_plugin(NETWORKS, kind_of(config)).plugin.load()
        return ours(config, config)
    build: BuildNetwork = require_plugin(config, "net.kind").plugin.load()
    net = cast(object, build(config, config.options))
    if not isinstance(net, nn.Module):
        raise UserError(
            f"net.kind {config.kind!r}: {config.plugin} built a {type(net).__name__}, not a torch module"
        )
    cast(Any, net).null_label = config.null_label  # sampling looks for it there
    return net


def seeded_init(config: NetConfig, seed: int) -> nn.Module:
    """A fresh network whose weights are a function of (config, seed); torch's global generator is left as it was.

    Raises: ValueError naming seed outside 0..2^63-1.
    """
    with seeded(seed):
        return build_net(config)


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Within it torch's global generator on the CPU starts from `seed`; afterwards it is as it was."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in 0..2^63-1, not {seed}")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The parts of a network whose weights FSDP collects together; none where it names none."""
    blocks = cast(Callable[[], list[nn.Module]] | None, getattr(net, "blocks", None))
    return [] if blocks is None else [*blocks()]


def parameter_count(net: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in net.parameters())
