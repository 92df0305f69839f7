"""A group of workers without Ray: processes joined by gloo, as torchrun would join them."""

import json
import multiprocessing
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.reading.loader import Batch, Loader, resilient_batches
from ddpm_pipeline.devices import set_up_arithmetic
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.train import session
from ddpm_pipeline.train.checkpoint import Checkpoint, latest_checkpoint
from ddpm_pipeline.train.run_logger import RunLogger
from ddpm_pipeline.train.training_plan import plan_training
from ddpm_pipeline.train.worker import TrainTask, WorkerContext, train_worker

CPU = torch.device("cpu")
PATIENCE_SECONDS = 100
"""After which a rank that has not ended is killed; an exchange between ranks is given up only later."""


@dataclass(frozen=True)
class Outcome:
    """What a group did."""

    exit_codes: list[int | None]
    """Of each rank; None for one that had to be killed."""
    checkpoint: Checkpoint | None
    points: dict[int, dict[str, float]]
    """Metrics by step."""
    positions: list[tuple[int, int, list[int]]]
    """(step, rank, positions) in order."""


def run_group(
    config: TrainConfig,
    world: int,
    folder: Path,
    stop_at: int | None = None,
    torn_at: int | None = None,
    device_type: str = "cpu",
) -> Outcome:
    """Train with `world` processes. `stop_at`: it ends with a checkpoint after this step; `torn_at`: the last rank
    alone finds its samples of this step damaged. `device_type`: "cuda" for a GPU each, joined by NCCL.
    """
    plan = plan_training(config)
    task = TrainTask(config, plan.identity, plan.store.uri, plan.index.digest)
    notes = folder / uuid.uuid4().hex[:8]
    notes.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ddpm_pipeline.train.worker"])
    members = [
        context.Process(
            target=_member,
            args=(dict(os.environ), task, WorkerContext(rank, world, device), notes, stop_at, torn_at),
        )
        for rank, device in enumerate(_devices(device_type, world))
    ]
    for member in members:
        member.start()
    for member in members:
        member.join(PATIENCE_SECONDS)
    codes = [member.exitcode for member in members]
    for member in members:
        if member.exitcode is None:
            member.kill()
            member.join()
    return Outcome(codes, latest_checkpoint(plan.store), _points(notes), _positions(notes))


def _member(
    variables: dict[str, str],
    task: TrainTask,
    place: WorkerContext,
    notes: Path,
    stop_at: int | None,
    torn_at: int | None,
) -> None:
    os.environ.update(variables)  # the server it was forked from may be older than the stack
    torch.set_num_threads(task.config.workers.cpus_per_worker)
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    set_up_arithmetic(task.config.matmul, deterministic=task.config.deterministic)
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    dist.init_process_group(
        "nccl" if place.device.type == "cuda" else "gloo",
        f"file://{notes}/join",
        rank=place.rank,
        world_size=place.world,
        timeout=timedelta(seconds=3 * PATIENCE_SECONDS),
    )
    RunLogger.metrics = _Notes(notes / "points").metrics  # type: ignore[method-assign]
    tears = torn_at if place.rank == place.world - 1 else None
    session.resilient_batches = _Witness(notes / f"positions-{place.rank}", place.rank, tears)
    train_worker(task, place, _Asks(stop_at) if place.rank == 0 else None)
    dist.destroy_process_group()


def _devices(device_type: str, world: int) -> list[torch.device]:
    return [torch.device("cuda", rank) if device_type == "cuda" else CPU for rank in range(world)]


class _Asks:
    """A driver that asks in time for the group, whose vote takes one step, to stop after step `stop_at`."""

    def __init__(self, stop_at: int | None) -> None:
        self._stop_at, self._asked = stop_at, 0

    def report(self, step: int, note: str) -> None:
        """Nobody listens."""

    def should_stop(self) -> bool:
        self._asked += 1
        return self._stop_at is not None and self._asked >= self._stop_at - 1


class _Notes:
    """Takes the metrics that would go to the spool."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        with self._file.open("a") as out:
            out.write(json.dumps([step, dict(values)]) + "\n")


class _Witness:
    """Writes down which positions this rank trains on, and finds those of step `torn_at` damaged."""

    def __init__(self, file: Path, rank: int, torn_at: int | None) -> None:
        self._file, self._rank, self._torn_at = file, rank, torn_at

    def __call__(self, loader: Loader, start: int, stop: int) -> Iterator[Batch]:
        for batch in resilient_batches(loader, start, stop):
            if batch.step == self._torn_at:
                raise DamageError(f"step {batch.step}: torn")
            with self._file.open("a") as out:
                out.write(json.dumps([batch.step, self._rank, batch.positions.tolist()]) + "\n")
            yield batch


def _points(notes: Path) -> dict[int, dict[str, float]]:
    file, points = notes / "points", dict[int, dict[str, float]]()
    for line in file.read_text().splitlines() if file.exists() else ():
        step, values = json.loads(line)
        points.setdefault(step, {}).update(values)
    return points


def _positions(notes: Path) -> list[tuple[int, int, list[int]]]:
    lines = [line for file in notes.glob("positions-*") for line in file.read_text().splitlines()]
    return sorted((step, rank, positions) for step, rank, positions in map(json.loads, lines))
