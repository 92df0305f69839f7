"""Groups of workers, without Ray: their number may change at any stop, and one that fails does not leave the others."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.store import open_store
from ddpm_pipeline.train import worker
from ddpm_pipeline.train.checkpoint import save_checkpoint
from tests.effort import long
from tests.train.group import CPU, Outcome, run_group
from tests.train.tiny import tiny

STOP = 10  # inside a window of 4 steps and between two checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("groups")


def config_of(digits: str, folder: Path, name: str) -> TrainConfig:
    return tiny(digits, f"file://{folder}/{name}", steps=20)


@pytest.fixture(scope="module")
def whole(digits: str, folder: Path) -> Outcome:
    """Two workers, undisturbed."""
    return run_group(config_of(digits, folder, "whole"), 2, folder)


@pytest.fixture(scope="module")
def halves(digits: str, folder: Path) -> Outcome:
    """Two workers, stopped on the way."""
    return run_group(config_of(digits, folder, "halves"), 2, folder, stop_at=STOP)


@pytest.mark.parametrize("world", [1, long(3)])
def test_stopped_with_two_workers_it_goes_on_with_any_number(
    digits: str, folder: Path, whole: Outcome, halves: Outcome, world: int
) -> None:
    assert halves.checkpoint is not None
    assert halves.checkpoint.record.step == STOP
    shutil.copytree(folder / "halves", folder / f"on-{world}")
    rest = run_group(config_of(digits, folder, f"on-{world}"), world, folder)
    assert rest.exit_codes == [0] * world
    assert places(halves) | places(rest) == places(whole)
    points = halves.points | rest.points
    assert points.keys() == whole.points.keys()
    for step, point in whole.points.items():
        for name in ("train/loss", "train/grad_norm", "train/lr"):
            assert points[step][name] == pytest.approx(point[name], abs=1e-4), (step, name)


def places(outcome: Outcome) -> dict[int, list[int]]:
    """The positions of every step, over all ranks, in order."""
    found: dict[int, list[int]] = {}
    for step, _, positions in outcome.positions:
        found.setdefault(step, []).extend(positions)
    return found


def test_a_rank_that_fails_alone_does_not_leave_the_others_waiting(digits: str, folder: Path) -> None:
    outcome = run_group(config_of(digits, folder, "torn"), 2, folder, torn_at=5)
    assert 0 not in outcome.exit_codes
    assert None not in outcome.exit_codes, "a rank waited for the one that failed"
    assert [step for step, rank, _ in outcome.positions if rank == 0][-1] == 5, "rank 0 began the step"


def test_every_rank_starts_from_the_checkpoint_that_rank_0_found(
    runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"{runs}/one")
    for step in (8, 16):
        save_checkpoint(store, step, {"net/w": torch.full((2,), float(step))}, "id")

    def told(tensor: torch.Tensor, src: int) -> None:
        tensor.fill_(8)  # rank 0 looked before 16 was published

    monkeypatch.setattr(dist, "broadcast", told)
    monkeypatch.setattr(dist, "all_reduce", lambda votes, op: None)  # rank 0 has it too
    found = worker._starting_point(store, worker.WorkerContext(1, 2, CPU))
    assert found is not None
    assert found.record.step == 8
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: tensor.fill_(-1))
    assert worker._starting_point(store, worker.WorkerContext(1, 2, CPU)) is None
