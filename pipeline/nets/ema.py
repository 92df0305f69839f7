"""Averages of the weights over training: what is sampled from is an average, not the last step.

Both kinds are pure functions of (state, net, step) and look the same to a training loop: `tracks` names the
averages kept, `update` moves them, `weights` gives one, `state_dict` is plain tensors.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

# The fused in-place form of torch.lerp over lists, which torch's own optimisers use; it has no public name.
_lerp_all = torch._foreach_lerp_  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


class WeightAverage(Protocol):
    """Running averages of a network's parameters."""

    @property
    def tracks(self) -> tuple[str, ...]:
        """Names of the averages kept; the first is the default."""
        ...

    def update(self, net: nn.Module, step: int) -> None:
        """Take in the parameters after optimiser step `step` (1, 2, ...), once for each step really taken."""
        ...

    def weights(self, track: str | None = None) -> dict[str, Tensor]:
        """The average named `track` (default: the first), by parameter name; the tensors are the live
        ones."""
        ...

    def copy_to(self, net: nn.Module, track: str | None = None) -> None:
        """Overwrite the parameters of `net` with the average."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All averages as "<track>/<parameter>": what a checkpoint holds."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises: ValueError naming a missing, extra or misshapen entry."""
        ...


class _Tracked:
    """Copies of a network's parameters under several names."""

    def __init__(self, net: nn.Module, tracks: tuple[str, ...]) -> None:
        self._tracks = tracks
        self._net: nn.Module | None = None
        self._parameters: list[nn.Parameter] = []
        parameters = dict(net.named_parameters())
        # float32 whatever the network is in: (1 - decay) of a half-precision weight would round away.
        self._averages = {
            track: {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()}
            for track in tracks
        }

    @property
    def tracks(self) -> tuple[str, ...]:
        return self._tracks

    @torch.no_grad()
    def _move(self, net: nn.Module, track: str, towards: float) -> None:
        """average += towards * (parameter - average), all parameters in a few fused kernels."""
        averages = self._averages[track]
        if self._net is not net:  # a walk through its modules would take a millisecond of each step
            self._net, self._parameters = net, list(net.parameters())
        current = [p.detach().to(torch.float32) for p in self._parameters]
        _lerp_all(list(averages.values()), current, towards)

    def weights(self, track: str | None = None) -> dict[str, Tensor]:
        return dict(self._averages[self._named(track)])

    @torch.no_grad()
    def copy_to(self, net: nn.Module, track: str | None = None) -> None:
        averages = self._averages[self._named(track)]
        for name, parameter in net.named_parameters():
            parameter.copy_(averages[name])

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{track}/{name}": value
            for track, averages in self._averages.items()
            for name, value in averages.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        for name in sorted(own.keys() ^ state.keys()):
            raise ValueError(f"state {'lacks' if name in own else 'has an unknown entry'} {name}")
        for name, value in own.items():
            if value.shape != state[name].shape:
                raise ValueError(f"state has {name} of {tuple(state[name].shape)}, not {tuple(value.shape)}")
            value.copy_(state[name])

    def _named(self, track: str | None) -> str:
        track = self._tracks[0] if track is None else track
        if track not in self._averages:
            raise ValueError(f"track must be one of {self._tracks}, not {track!r}")
        return track


class ConstantEMA(_Tracked):
    """Exponential average with a constant decay, reached through a warm-up."""

    def __init__(self, net: nn.Module, decay: float = 0.9999, warmup: bool = True) -> None:
        """decay: kept at each step, DDPM's 0.9999. warmup: at step n keep at most (1 + n) / (10 + n), without
        which an early average is mostly the random initial weights.
        """
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), not {decay}")
        super().__init__(net, ("ema",))
        self._decay, self._warmup = decay, warmup

    def update(self, net: nn.Module, step: int) -> None:
        _check_step(step)
        decay = min(self._decay, (1 + step) / (10 + step)) if self._warmup else self._decay
        self._move(net, "ema", 1 - decay)


class PowerEMA(_Tracked):
    """Power-function averages, whose length grows with training (Karras et al. 2024, EDM2, section 3.1).

    Weights at step tau of t count as tau^gamma; snapshots of two lengths let `synthesise` make any other
    afterwards.
    """

    def __init__(self, net: nn.Module, widths: Sequence[float] = (0.05, 0.10)) -> None:
        """widths: sigma_rel of each average, its standard deviation over the training's length; EDM2's
        pair."""
        self._exponents = {track_of(width): exponent_of_width(width) for width in widths}
        if not widths or len(self._exponents) != len(widths):
            raise ValueError(f"widths must hold distinct lengths, not {tuple(widths)}")
        super().__init__(net, tuple(self._exponents))

    def update(self, net: nn.Module, step: int) -> None:
        """EDM2 eq. 8: decay (1 - 1/t)^(gamma + 1), which at t = 1 keeps nothing of the initial weights."""
        _check_step(step)
        for track, exponent in self._exponents.items():
            self._move(net, track, 1 - (1 - 1 / step) ** (exponent + 1))


def track_of(width: float) -> str:
    """Name of the power-function average of relative length `width`: 0.05 gives "power-0.050"."""
    return f"power-{width:.3f}"


def exponent_of_width(width: float) -> float:
    """gamma of the average with sigma_rel = `width` (EDM2, section 3.1 and algorithm 2).

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) falls with gamma, from 1/12 at 0; solved by
    bisection. Raises: ValueError naming width outside 0.001..0.28.
    """
    if not 0.001 <= width <= 0.28:
        raise ValueError(f"width must lie in 0.001..0.28, not {width}")
    low, high = 0.0, 4.0 / width
    for _ in range(200):
        middle = (low + high) / 2
        wider = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > width**2
        low, high = (middle, high) if wider else (low, middle)
    return (low + high) / 2


def synthesis_coefficients(snapshots: Sequence[tuple[int, float]], target: tuple[int, float]) -> list[float]:
    """Coefficients of the snapshots whose sum comes nearest to another average (EDM2 section 3.2, eq. 10 to
    12).

    snapshots: (step, width) of each; target: (step, width) wanted. Least squares between the averages'
    weights over training time, in float64. Raises: ValueError naming snapshots or target.
    """
    if not snapshots:
        raise ValueError("snapshots is empty")
    if target[0] > max(step for step, _ in snapshots):
        raise ValueError(f"target step {target[0]} lies beyond the last snapshot")
    profiles = [(step, exponent_of_width(width)) for step, width in snapshots]
    goal = (target[0], exponent_of_width(target[1]))
    gram = torch.tensor([[_overlap(a, b) for b in profiles] for a in profiles], dtype=torch.float64)
    wanted = torch.tensor([_overlap(a, goal) for a in profiles], dtype=torch.float64)
    return torch.linalg.lstsq(gram, wanted[:, None], driver="gelsd").solution[:, 0].tolist()


@torch.no_grad()
def synthesise(
    snapshots: Sequence[tuple[int, float, Mapping[str, Tensor]]], step: int, width: float
) -> dict[str, Tensor]:
    """The average of any length, after the fact, from saved ones: (step, width, weights) each.

    step, width: the average wanted; returns float32 weights by name, summed in float64.
    """
    factors = synthesis_coefficients([(s, w) for s, w, _ in snapshots], (step, width))
    names = snapshots[0][2].keys()
    if any(weights.keys() != names for _, _, weights in snapshots):
        raise ValueError("snapshots do not all hold the same parameters")
    result: dict[str, Tensor] = {}
    for name in names:
        terms = (f * w[name].double() for f, (_, _, w) in zip(factors, snapshots, strict=True))
        result[name] = torch.stack(list(terms)).sum(0).to(torch.float32)
    return result


def _overlap(a: tuple[int, float], b: tuple[int, float]) -> float:
    """Integral of the product of two averages' weights over training time (EDM2 eq. 22), safe from
    overflow."""
    (ta, ga), (tb, gb) = sorted((a, b))
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * math.exp(gb * math.log(ta / tb)) / tb


def _check_step(step: int) -> None:
    if step < 1:
        raise ValueError(f"step counts optimiser steps taken, from 1; got {step}")
