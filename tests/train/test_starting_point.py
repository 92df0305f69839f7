"""All workers of a group begin with one checkpoint, and none begins anew where there was one."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpm_pipeline.errors import DamageError, JobError
from ddpm_pipeline.store import FileStore
from ddpm_pipeline.train import worker
from ddpm_pipeline.train.checkpoint import (
    STATE,
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from ddpm_pipeline.train.worker import TrainTask, WorkerContext, _check_identity, _starting_point
from tests.train.tiny import tiny

TENSORS = {"net/weight": torch.zeros(2)}
WORLD = 3


class Together:
    """torch.distributed for ranks that are threads."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(WORLD)
        self._said: list[Tensor] = []

    def broadcast(self, tensor: Tensor, src: int) -> None:
        self._exchange(
            tensor, lambda said: max(said, key=int)
        )  # rank 0's step, among the zeros of the others

    def all_reduce(self, tensor: Tensor, op: object) -> None:
        self._exchange(tensor, lambda said: min(said, key=int))

    def _exchange(self, tensor: Tensor, choose: Callable[[list[Tensor]], Tensor]) -> None:
        self._said.append(tensor.clone())
        if self._barrier.wait(30) == 0:
            self._chosen, self._said = choose(self._said), []
        self._barrier.wait(30)
        tensor.copy_(self._chosen)
        self._barrier.wait(30)

    ReduceOp = torch.distributed.ReduceOp


def begin(monkeypatch: pytest.MonkeyPatch, stores: list[FileStore]) -> list[Checkpoint | Exception | None]:
    """What each rank begins with."""
    monkeypatch.setattr(worker, "dist", Together())
    found: list[Checkpoint | Exception | None] = [None] * WORLD

    def rank(number: int) -> None:
        try:
            found[number] = _starting_point(stores[number], WorkerContext(number, WORLD, torch.device("cpu")))
        except JobError as error:
            found[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


class Late(FileStore):
    """A rank that looks only after another group has written newer checkpoints and deleted the older ones."""

    def __init__(self, root: Path, newer: list[int]) -> None:
        super().__init__(root)
        self.newer = newer

    def read(self, key: str) -> bytes:
        if self.newer:
            other, step = FileStore(self.root), self.newer.pop(0)
            save_checkpoint(other, step, TENSORS, "id")
            prune_checkpoints(other, keep_last=1)
        return super().read(key)


@pytest.mark.parametrize("newer", [[], [20], [20, 30, 40]])
def test_a_checkpoint_deleted_before_all_ranks_had_it_is_given_up_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newer: list[int]
) -> None:
    save_checkpoint(FileStore(tmp_path), 10, TENSORS, "id")
    stores = [FileStore(tmp_path), FileStore(tmp_path), Late(tmp_path, list(newer))]
    steps = [one.record.step for one in begin(monkeypatch, stores) if isinstance(one, Checkpoint)]
    assert steps == [[10, *newer][-1]] * WORLD


def test_a_group_that_never_gets_hold_of_one_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(FileStore(tmp_path), 10, TENSORS, "id")
    stores = [FileStore(tmp_path), FileStore(tmp_path), Late(tmp_path, list(range(20, 120, 10)))]
    assert all("stop any other job that writes there" in str(one) for one in begin(monkeypatch, stores))


def test_a_group_without_checkpoints_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert begin(monkeypatch, [FileStore(tmp_path)] * WORLD) == [None] * WORLD


def task(digits: str, runs: str, finished_steps: int) -> TrainTask:
    return TrainTask(tiny(digits, runs), "id", "file:///run", "digest", finished_steps=finished_steps)


def test_checkpoints_that_are_gone_since_the_job_began_end_it(digits: str, runs: str) -> None:
    _check_identity(task(digits, runs, 0), None)
    with pytest.raises(DamageError, match="the newest of step 10, are gone since the job started"):
        _check_identity(task(digits, runs, 10), None)


def test_the_checkpoint_of_another_training_is_refused(tmp_path: Path, digits: str, runs: str) -> None:
    store = FileStore(tmp_path)
    save_checkpoint(store, 10, TENSORS, "another")
    with pytest.raises(DamageError, match="checkpoint 10 is of training another, not of id; delete it"):
        _check_identity(task(digits, runs, 10), latest_checkpoint(store))


def test_a_state_of_another_size_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path)
    save_checkpoint(store, 10, TENSORS, "id")
    with store.path(f"checkpoints/{10:012d}/{STATE}").open("ab") as file:
        file.truncate(1 << 40)
    monkeypatch.delattr(FileStore, "download")
    with pytest.raises(DamageError, match="1099511627776 bytes, its record says"):
        load_checkpoint(store, 10)
