"""How training draws its timesteps."""

import pytest
import torch
from torch import Tensor

from ddpm_pipeline.config.diffusion import ObjectiveConfig, Target, TimestepsConfig
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.diffusion.noise import Stream, randint
from ddpm_pipeline.diffusion.objective import loss_weight
from ddpm_pipeline.diffusion.timestep_draw import TimestepDraw

SCHEDULE = NoiseSchedule.cosine(1000)
BATCH = 64
TARGETS: list[Target] = ["eps", "x0", "v"]


def draw_of(
    target: Target = "v", *, importance: bool = False, stratified: bool = False, T: int = 1000
) -> TimestepDraw:
    objective = ObjectiveConfig(target=target, weighting="min-snr")
    config = TimestepsConfig(importance=importance, stratified=stratified)
    return TimestepDraw(config, NoiseSchedule.cosine(T), objective, BATCH)


def probability(draw: TimestepDraw) -> Tensor:
    return draw.thresholds.diff(prepend=torch.zeros(1, dtype=torch.int64)).double() / 2**31


@pytest.mark.parametrize("target", TARGETS)
def test_importance_has_the_expectation_of_the_weighted_loss_over_equally_likely_timesteps(
    target: Target,
) -> None:
    draw = draw_of(target, importance=True)
    weights = loss_weight(SCHEDULE, ObjectiveConfig(target=target, weighting="min-snr"), torch.arange(1000))
    assert draw.weight is not None
    assert torch.allclose(1000 * probability(draw) * draw.weight, weights.double(), rtol=0, atol=1e-5)
    assert draw_of(target, stratified=True).weight is None


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("importance", [False, True])
def test_timesteps_are_as_frequent_as_they_should_be(importance: bool, stratified: bool) -> None:
    draw = draw_of(importance=importance, stratified=stratified, T=10)
    found = draw.draw(3, torch.arange(320 * BATCH))
    assert int(found.min()) >= 0
    share = found.bincount(minlength=10).double() / len(found)
    assert torch.allclose(share, probability(draw), atol=0.015)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("importance", [False, True])
def test_a_timestep_is_a_function_of_seed_and_position(importance: bool, stratified: bool) -> None:
    draw = draw_of(importance=importance, stratified=stratified)
    whole = draw.draw(3, torch.arange(500))
    assert torch.equal(draw.draw(3, torch.tensor([499, 7])), whole[[499, 7]])
    assert not torch.equal(draw.draw(4, torch.arange(500)), whole)


def test_stratified_timesteps_of_a_step_lie_evenly_and_move_from_step_to_step() -> None:
    found = draw_of(stratified=True, T=BATCH * 8).draw(0, torch.arange(2 * BATCH))
    for step in found.split(BATCH):
        assert set(step.sort().values.diff().tolist()) <= {7, 8, 9}
    assert not torch.equal(found[:BATCH], found[BATCH:])


def test_the_plain_draw_is_that_of_earlier_versions() -> None:
    positions = torch.arange(100)
    assert torch.equal(draw_of().draw(5, positions), randint(5, Stream.TRAIN_TIMESTEP, positions, 1000))
