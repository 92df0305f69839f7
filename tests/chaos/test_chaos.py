"""Two fixed rounds of `make chaos`: faults no other test makes, one job each."""

from pathlib import Path

import pytest

from ddpm_pipeline.infra.local import LocalStack
from tests.chaos.rounds import Arena

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(600)]

# a generation without MLflow and with a second driver; a training with a worker killed and its network cut
ROUNDS = {"generation": (321, 1), "training": (360, 1)}


def test_attacked_jobs_end_as_undisturbed_ones_do(stack: LocalStack, tmp_path: Path) -> None:
    arena = Arena(stack, tmp_path)
    outcomes = [arena.play(seed, number, (kind,)) for kind, (seed, number) in ROUNDS.items()]
    assert [outcome.kind for outcome in outcomes] == list(ROUNDS)
    assert {outcome.lost for outcome in outcomes} == {()}
