"""What one worker does, from an empty process to the last checkpoint; the same under Ray or alone."""

import threading
from contextlib import closing
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.training import TrainConfig, WorkerConfig
from pipeline.data.index import load_index
from pipeline.data.reading.loader import Batch, Loader
from pipeline.diffusion import NoiseSchedule
from pipeline.errors import DamageError, JobError, UserError
from pipeline.progress import Progress
from pipeline.store import ObjectMissing, Store, open_store, retry_during_outage
from pipeline.telemetry.logs import name_process
from pipeline.train.checkpoint import (
    MOST_LOOKS,
    Checkpoint,
    CheckpointWriter,
    latest_checkpoint,
    load_checkpoint,
)
from pipeline.train.finetune import staged_weights
from pipeline.train.loop import Trainer, chunk_loss, micro_batches
from pipeline.train.memory import with_micro_batch
from pipeline.train.run_logger import RunLogger, log_node_metrics
from pipeline.train.session import Driver, Session
from pipeline.train.state import TrainState, initial_state


@dataclass(frozen=True)
class TrainTask:
    """What every worker is told: plain data, the same for all."""

    config: TrainConfig
    identity: str
    """Digest that names the training."""
    run_uri: str
    """Place of its checkpoints."""
    data_digest: str
    """Digest of the index that the driver saw; a worker that sees another refuses."""
    tracking_uri: str | None = None
    run_id: str | None = None
    """The MLflow run, which the driver owns; None = nothing is tracked."""
    protected: frozenset[str] = frozenset()
    """Places that registered models need: checkpoints there are never deleted."""
    initial_sha256: str | None = None
    """Of the weights staged beside the checkpoints, which fine-tuning begins with; None = drawn from the seed."""
    started_seconds: float = 0.0
    """Unix time of the run's first start, from which system metrics are counted."""
    finished_steps: int = 0
    """Of the newest checkpoint that the driver saw; more than 0: the training goes on, or it ends."""


@dataclass(frozen=True)
class WorkerContext:
    """Where in the group of workers this one stands."""

    rank: int
    world: int
    device: torch.device
    node: str | None = None
    """Name of the node, on the one worker that reads its load; None on the others."""


class WorkerGroupStartError(JobError):
    """A group of workers was lost before it trained, as when one of them dies while they join each other.

    Ray Train keeps what such a group had reserved, workers and placement group, for as long as its driver is
    connected: no group after it would find room. So the job leaves the cluster and begins again.
    """


class UnreachableError(WorkerGroupStartError):
    """The workers of a group lived and could not join: one of them died meanwhile, or their nodes' network is wrong."""


def train_worker(task: TrainTask, place: WorkerContext, driver: Driver | None) -> None:
    """Train from the last whole checkpoint to the last step, or until `driver`, given on rank 0, says stop.

    Raises DamageError for data that is not what the driver saw, NonFiniteError for a training gone wrong.
    """
    name_process(run=task.config.name, rank=place.rank)
    config = with_micro_batch(task.config, place.world, place.device)
    store = open_store(task.run_uri)
    checkpoint = _starting_point(store, place)
    _check_belonging(task, checkpoint)
    begins_with = task.initial_sha256 if checkpoint is None else None
    weights = staged_weights(store, begins_with) if begins_with is not None else None
    state = initial_state(config, place.device, weights)
    if checkpoint is not None:
        state.load(checkpoint.record.step, checkpoint.tensors)
    trainer = Trainer(
        config=config,
        schedule=NoiseSchedule.from_config(config.schedule),
        network=_shared(state.net, config, place),
        device=place.device,
        world=place.world,
    )
    run_id = task.run_id if place.rank == 0 else None
    watched = log_node_metrics(task.tracking_uri, task.run_id, place.node, task.started_seconds, config.track)
    with (
        RunLogger(task.tracking_uri, run_id, config.track) as diary,
        watched,
        closing(_loader(task, place)) as loader,
    ):
        _prime(trainer, state, place)
        kept = config.checkpoint
        writer = CheckpointWriter(store, task.identity, kept.keep_last, task.protected, kept.keep_best)
        tensors = checkpoint.tensors if checkpoint is not None else {}
        diary.take_over(tensors)
        Session(trainer, state, diary, writer, driver).run(loader, tensors)


def _check_belonging(task: TrainTask, checkpoint: Checkpoint | None) -> None:
    """Raise DamageError where this training would begin anew, or go on from another's state, without a word."""
    if checkpoint is None and task.finished_steps:
        raise DamageError(
            f"{task.run_uri}: its checkpoints, the newest of step {task.finished_steps}, are gone since the job began; "
            "restore them, or start the job again to begin anew"
        )
    if checkpoint is not None and checkpoint.record.identity != task.identity:
        raise DamageError(
            f"{task.run_uri}: checkpoint {checkpoint.record.step} is of training {checkpoint.record.identity}, "
            f"not of {task.identity}; delete it"
        )


def _starting_point(store: Store, place: WorkerContext) -> Checkpoint | None:
    """The newest whole checkpoint as rank 0 finds it, on every rank; None for a training that begins.

    Each looking for itself might find another: a writer of the group before may still be publishing or deleting. Where
    it deletes what rank 0 found before another rank has read it, all look again.
    """
    for _ in range(MOST_LOOKS):
        found = retry_during_outage(lambda: latest_checkpoint(store)) if place.rank == 0 else None
        if place.world == 1:
            return found
        step = _told_by_rank_0(-1 if found is None else found.record.step, place)
        if step < 0:
            return None
        found = found or _still_there(store, step)
        if _all_have(found is not None, place):
            return found
    raise JobError(
        f"{store.uri}: each checkpoint was deleted before all workers had read it; does another job write there?"
    )


def _still_there(store: Store, step: int) -> Checkpoint | None:
    try:
        return retry_during_outage(lambda: load_checkpoint(store, step))
    except ObjectMissing:
        return None


def _all_have(one: bool, place: WorkerContext) -> bool:
    """Whether every rank says so. A collective call."""
    votes = torch.tensor([int(one)], dtype=torch.int64, device=place.device)
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)


def _told_by_rank_0(number: int, place: WorkerContext) -> int:
    """Rank 0's `number`, on every rank. A collective call."""
    told = torch.tensor([number], dtype=torch.int64, device=place.device)
    dist.broadcast(told, src=0)
    return int(told)


def _loader(task: TrainTask, place: WorkerContext) -> Loader:
    config = task.config
    index = retry_during_outage(lambda: load_index(config.data.uri))
    if index.digest != task.data_digest:
        raise DamageError(f"{config.data.uri}: its index changed since the job began; start the job again")
    return Loader(config.data, index, config.seed, config.global_batch, place.rank, place.world)


def _shared(net: nn.Module, config: TrainConfig, place: WorkerContext) -> nn.Module:
    """The network as the workers share it: gradients are averaged over them."""
    if config.compile:
        net.compile()
    if place.world == 1:
        return net
    # every rank computes the same initial weights, so none has to be told them
    devices = [place.device.index] if place.device.type == "cuda" else None
    return DistributedDataParallel(net, device_ids=devices, init_sync=False)


def _prime(trainer: Trainer, state: TrainState, place: WorkerContext) -> None:
    """One forward and backward pass whose gradient is thrown away.

    DDP regroups the gradients it sends together after its first pass, and with three or more workers the grouping
    decides the order of a sum. Without this pass the first step after a restart would differ in its last bits
    from the same step of an undisturbed run.
    """
    if place.world == 1:
        return
    config = trainer.config
    share = config.global_batch // place.world
    edge = config.data.crop or config.net.image_size
    blank = Batch(
        step=0,
        positions=torch.zeros(share, dtype=torch.int64),
        images=torch.zeros(share, config.net.in_channels, edge, edge, dtype=torch.uint8),
        labels=torch.zeros(share, dtype=torch.int64),
        wait_seconds=0.0,
    )
    terms, _ = chunk_loss(trainer, micro_batches(blank, config.workers.micro_batch)[-1])
    terms.per_sample.sum().backward()
    state.optimizer.zero_grad(set_to_none=True)


def require_device(workers: WorkerConfig) -> None:
    """UserError when the settings ask for a GPU that torch cannot use here."""
    if workers.gpus_per_worker and not torch.cuda.is_available():
        raise UserError(
            f"train.workers.gpus_per_worker: {workers.gpus_per_worker:g} asked for, but torch {torch.__version__} can "
            "use no GPU of this machine (see ddpm doctor); set it to 0 to train on the CPU"
        )


def train_local(task: TrainTask, progress: Progress, stop: threading.Event) -> None:
    """Train here as the only worker, on a GPU if the settings ask for one; ends early once `stop` is set."""
    workers = task.config.workers
    device = torch.device("cuda" if workers.gpus_per_worker else "cpu")

    torch.set_num_threads(workers.cpus_per_worker * workers.most)
    place = WorkerContext(rank=0, world=1, device=device, node="node0")
    train_worker(task, place, _LocalDriver(task.config.steps, progress, stop))


class _LocalDriver:
    """The driver of a training in this process."""

    def __init__(self, total: int, progress: Progress, stop: threading.Event) -> None:
        self._total, self._progress, self._stop = total, progress, stop

    def tell(self, step: int, note: str) -> None:
        self._progress(step, self._total, note)

    def asks_to_stop(self) -> bool:
        return self._stop.is_set()
