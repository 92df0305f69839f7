"""Averages of weights: what they are, that they are pure functions, and synthesis after the fact."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ddpm_pipeline.nets.ema import (
    ConstantEMA,
    PowerEMA,
    WeightAverage,
    exponent_of_width,
    synthesis_coefficients,
    synthesise,
    track_of,
)


class Counter(nn.Module):
    """A network whose only weight is what `path` says at each step."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([start]))


def run(average: WeightAverage, net: Counter, path: Callable[[int], float], steps: range) -> None:
    for step in steps:
        net.weight.data.fill_(path(step))
        average.update(net, step)


def path(step: int) -> float:
    return math.sin(step / 7) + step / 100


@pytest.mark.parametrize("kind", [lambda n: ConstantEMA(n, 0.9), PowerEMA], ids=["constant", "power"])
def test_both_kinds_resume_from_their_state_without_a_trace(
    kind: Callable[[nn.Module], WeightAverage],
) -> None:
    net = Counter()
    whole = kind(net)
    run(whole, net, path, range(1, 51))
    first = kind(Counter())
    run(first, net, path, range(1, 21))
    second = kind(Counter(99.0))
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    run(second, net, path, range(21, 51))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_a_constant_average_is_the_sum_it_stands_for() -> None:
    net = Counter(2.0)
    average = ConstantEMA(net, decay=0.9, warmup=False)
    run(average, net, path, range(1, 31))
    expected = 2.0 * 0.9**30 + sum(0.1 * 0.9 ** (30 - s) * path(s) for s in range(1, 31))
    assert average.weights()["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_warm_up_forgets_the_initial_weights_at_once() -> None:
    net = Counter(1000.0)
    warm, cold = ConstantEMA(net, 0.9999), ConstantEMA(net, 0.9999, warmup=False)
    for average in (warm, cold):
        run(average, net, lambda _: 0.0, range(1, 101))
    assert warm.weights()["weight"].item() < 1e-3
    assert cold.weights()["weight"].item() > 900


def test_a_power_average_weighs_by_the_power_of_the_step() -> None:
    """EDM2 section 3.1: weights proportional to (almost) tau^gamma; a linear path tells its centre of mass."""
    net, steps = Counter(123.0), 4000
    average = PowerEMA(net, widths=(0.10,))
    run(average, net, float, range(1, steps + 1))
    gamma = exponent_of_width(0.10)
    assert average.weights()["weight"].item() / steps == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.25, 0.72)])
def test_widths_are_the_papers_exponents(width: float, gamma: float) -> None:
    found = exponent_of_width(width)
    assert found == pytest.approx(gamma, abs=0.01)
    assert (found + 1) / ((found + 2) ** 2 * (found + 3)) == pytest.approx(width**2, rel=1e-9)


def test_any_length_is_synthesised_from_two_tracks_of_snapshots() -> None:
    net, steps, wanted = Counter(), 2000, 0.07
    average, target = PowerEMA(net), PowerEMA(net, widths=(wanted,))
    snapshots: list[tuple[int, float, dict[str, torch.Tensor]]] = []
    for step in range(1, steps + 1):
        net.weight.data.fill_(path(step))
        average.update(net, step)
        target.update(net, step)
        if step % 250 == 0:
            for width in (0.05, 0.10):
                saved = {name: value.clone() for name, value in average.weights(track_of(width)).items()}
                snapshots.append((step, width, saved))
    made = synthesise(snapshots, steps, wanted)["weight"].item()
    assert made == pytest.approx(target.weights()["weight"].item(), rel=2e-3)


def test_synthesis_of_a_saved_average_is_that_average() -> None:
    snapshots = [(500, 0.05), (500, 0.10), (1000, 0.05), (1000, 0.10)]
    assert synthesis_coefficients(snapshots, (1000, 0.10)) == pytest.approx([0, 0, 0, 1], abs=1e-8)
    assert sum(synthesis_coefficients(snapshots, (1000, 0.08))) == pytest.approx(1, abs=0.05)


def test_averages_of_a_half_precision_network_are_kept_in_float32() -> None:
    net = Counter().to(torch.bfloat16)
    average = ConstantEMA(net, 0.999, warmup=False)
    run(average, net, lambda _: 1.0, range(1, 11))
    kept = average.weights()["weight"]
    assert kept.dtype == torch.float32
    assert kept.item() == pytest.approx(1 - 0.999**10, rel=1e-4)
    average.copy_to(net)
    assert net.weight.dtype == torch.bfloat16


def test_copying_an_average_fills_the_network() -> None:
    net = Counter()
    average = PowerEMA(net)
    run(average, net, path, range(1, 100))
    other = Counter(-5.0)
    average.copy_to(other, track_of(0.10))
    assert torch.equal(other.weight.data, average.weights("power-0.100")["weight"])
    assert average.tracks == ("power-0.050", "power-0.100")


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ConstantEMA(Counter(), 1.0), "decay"),
        (lambda: PowerEMA(Counter(), ()), "widths"),
        (lambda: PowerEMA(Counter(), (0.1, 0.1)), "widths"),
        (lambda: exponent_of_width(0.5), "width"),
        (lambda: ConstantEMA(Counter()).update(Counter(), 0), "step"),
        (lambda: ConstantEMA(Counter()).weights("power-0.050"), "track"),
        (lambda: ConstantEMA(Counter()).load_state_dict({}), "ema/weight"),
        (lambda: ConstantEMA(Counter()).load_state_dict({"ema/weight": torch.zeros(2)}), "ema/weight"),
        (
            lambda: ConstantEMA(Counter()).load_state_dict(
                {"ema/weight": torch.zeros(1), "x": torch.zeros(1)}
            ),
            "unknown entry x",
        ),
        (lambda: synthesis_coefficients([], (1, 0.1)), "snapshots"),
        (lambda: synthesis_coefficients([(10, 0.1)], (11, 0.1)), "target"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
