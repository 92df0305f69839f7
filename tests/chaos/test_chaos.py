"""Two fixed rounds of `make chaos`: faults no other test makes, one job each."""

from pathlib import Path

import pytest

from infra.local import LocalStack
from tests.chaos.rounds import Arena

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

ROUNDS = [(1, 3), (3, 4)]  # a generation without MLflow; a training with its network cut and a worker killed


def test_attacked_jobs_end_as_undisturbed_ones_do(stack: LocalStack, tmp_path: Path) -> None:
    arena = Arena(stack, tmp_path)
    outcomes = [arena.play(seed, number) for seed, number in ROUNDS]
    assert {outcome.kind for outcome in outcomes} == {"training", "generation"}
    assert {outcome.lost for outcome in outcomes} == {()}
