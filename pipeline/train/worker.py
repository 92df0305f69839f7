"""One training worker, from an empty process to the last checkpoint: the same under Ray and in this process."""

import logging
import threading
from contextlib import closing
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from ddpm_pipeline.config.device_kind import DeviceKind
from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.config.plugins import require_plugins
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.reading.loader import Batch, Loader
from ddpm_pipeline.devices import read_device_kind, set_up_arithmetic
from ddpm_pipeline.devices.emulated_precision import warn_if_emulated
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.errors import DamageError, JobError
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.store import ObjectMissing, Store, open_store, retry_during_outage
from ddpm_pipeline.telemetry.logs import name_process
from ddpm_pipeline.train.captured_gradients import captured_gradients
from ddpm_pipeline.train.checkpoint import (
    MAX_LISTINGS,
    Checkpoint,
    CheckpointWriter,
    TrainingDevice,
    latest_checkpoint,
    load_checkpoint,
)
from ddpm_pipeline.train.data_parallel import is_divided, wrap
from ddpm_pipeline.train.finetune import staged_model
from ddpm_pipeline.train.loop import Trainer, chunk_loss
from ddpm_pipeline.train.memory import limit_device_memory, out_of_memory_in_one_line, with_micro_batch
from ddpm_pipeline.train.plugin_record import record_plugins
from ddpm_pipeline.train.rank_watch import RankMarker
from ddpm_pipeline.train.run_logger import RunLogger, log_node_metrics
from ddpm_pipeline.train.session import Driver, Session
from ddpm_pipeline.train.state import FOLDERS, TrainState, initial_state
from ddpm_pipeline.train.teacher import make_teacher
from ddpm_pipeline.train.train_task import TrainTask

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerContext:
    """This worker's rank, device and node."""

    rank: int
    world: int
    device: torch.device
    node: str | None = None
    """Name of the node, on the one worker per node that reads its load; None on the others."""
    marker: RankMarker | None = None
    """Tells the driver what this rank is doing; None without Ray."""


def train_worker(task: TrainTask, context: WorkerContext, driver: Driver | None) -> int:
    """Train from the last whole checkpoint to the last step, or until `driver`, given on rank 0, requests a stop.

    Returns the step of the checkpoint that it ends with. Raises DamageError for data that differs from what the driver
    read, NonFiniteError for a diverged training.
    """
    name_process(run=task.config.name, rank=context.rank)
    require_plugins(task.config)
    limit_device_memory(task.config.workers, context.device)
    if task.config.precision == "bfloat16" and context.rank == 0:
        warn_if_emulated(torch.bfloat16, context.device)
    config = with_micro_batch(task.config, context.world, context.device)
    with out_of_memory_in_one_line(config, context.world):
        return _train(task, config, context, driver)


def _train(task: TrainTask, config: TrainConfig, context: WorkerContext, driver: Driver | None) -> int:
    """The same with a micro-batch."""
    store = open_store(task.run_uri)
    if context.rank == 0:
        retry_during_outage(lambda: record_plugins(store, config))
    checkpoint = _starting_point(store, context)
    _check_identity(task, checkpoint)
    begins = checkpoint is None
    initial = _initial_model(task, store) if begins or config.distillation is not None else None
    weights = initial[1].state_dict() if initial is not None and begins else None
    state = initial_state(config, context.device, weights, context.world)
    if checkpoint is not None:
        state.load(checkpoint.record.step, checkpoint.tensors)
        # the state has them now; a second copy in memory would stay to the end
        rest = {name: value for name, value in checkpoint.tensors.items() if not name.startswith(FOLDERS)}
        checkpoint = replace(checkpoint, tensors=rest)
    if config.compile:
        state.net.compile()
    trainer = Trainer(
        config=config,
        schedule=NoiseSchedule.from_config(config.schedule).to(context.device),
        network=wrap(state.net, config.workers, context.device, context.world),
        device=context.device,
        world=context.world,
        equal_sizes=config.compile or is_divided(state.net),
        teacher=None
        if initial is None
        else make_teacher(config, initial[0].objective, initial[1], context.device, context.world),
        captured=captured_gradients(config, state.net, context.device, context.world),
    )
    run_id = task.run_id if context.rank == 0 else None
    node_metrics = log_node_metrics(
        task.tracking_uri,
        task.run_id,
        context.node,
        task.started_seconds,
        config.track,
        on_gpus=context.device.type == "cuda",
    )
    with (
        RunLogger(task.tracking_uri, run_id, config.track, config.name) as run_logger,
        node_metrics,
        closing(_loader(task, context)) as loader,
    ):
        _warm_up(trainer, state, context)
        kept = config.checkpoint
        device = training_device(config, context.device, checkpoint)
        if context.rank == 0:
            run_logger.tags(device_tags(device, checkpoint))
        writer = CheckpointWriter(
            store, task.identity, kept.keep_last, task.protected, kept.keep_best, device
        )
        tensors = checkpoint.tensors if checkpoint is not None else {}
        run_logger.restore(tensors)
        Session(trainer, state, run_logger, writer, driver, context.marker).run(loader, tensors)
    return state.step


def _initial_model(task: TrainTask, store: Store) -> tuple[ModelCard, nn.Module] | None:
    """The model that the training starts from, or that teaches."""
    return None if task.initial_sha256 is None else staged_model(store, task.initial_sha256)


def training_device(
    config: TrainConfig, device: torch.device, resumed: Checkpoint | None
) -> TrainingDevice | None:
    """What this training computes on from here, for its records; None on a CPU."""
    kind = read_device_kind(device)
    if kind is None:
        return None
    before = resumed.record.device if resumed is not None else None
    deterministic = config.deterministic and (before is None or before.deterministic)
    return TrainingDevice(kind=kind, matmul=config.matmul, deterministic=deterministic)


def device_tags(device: TrainingDevice | None, resumed: Checkpoint | None) -> dict[str, str]:
    """Tags of the run that say what computes the weights. Warns where it is not what computed the steps so far."""
    tags = {"ddpm.device": str(device or "CPU"), "ddpm.deterministic": "true"}
    if device is not None:
        tags |= {"ddpm.matmul": device.matmul, "ddpm.deterministic": str(device.deterministic).lower()}
    if resumed is not None and _kind_of(resumed.record.device) != _kind_of(device):
        change = f"step {resumed.record.step}: from {resumed.record.device or 'CPU'} to {device or 'CPU'}"
        tags["ddpm.device_change"] = change
        log.warning(
            "resuming on another kind of device (%s): it rounds differently, so the weights will differ in their "
            "last bits from those of a training that stays on one kind",
            change,
        )
    return tags


def _kind_of(device: TrainingDevice | None) -> DeviceKind | None:
    return None if device is None else device.kind


def _check_identity(task: TrainTask, checkpoint: Checkpoint | None) -> None:
    """Raise DamageError rather than silently restart at step 0 or resume from another training's state."""
    if checkpoint is None and task.finished_steps:
        raise DamageError(
            f"{task.run_uri}: its checkpoints, the newest of step {task.finished_steps}, are gone since the job "
            "started; restore them, or start the job again to train from step 0"
        )
    if checkpoint is not None and checkpoint.record.identity != task.identity:
        raise DamageError(
            f"{task.run_uri}: checkpoint {checkpoint.record.step} is of training {checkpoint.record.identity}, "
            f"not of {task.identity}; delete it"
        )


def _starting_point(store: Store, context: WorkerContext) -> Checkpoint | None:
    """The newest valid checkpoint as rank 0 finds it, on every rank; None for a new training.

    Ranks that looked on their own might find different ones: a writer of the previous group may still be publishing or
    deleting. If it deletes rank 0's choice before another rank has read it, all look again.
    """
    for _ in range(MAX_LISTINGS):
        found = retry_during_outage(lambda: latest_checkpoint(store)) if context.rank == 0 else None
        if context.world == 1:
            return found
        step = _broadcast_from_rank_0(-1 if found is None else found.record.step, context)
        if step < 0:
            return None
        found = found or _load_if_present(store, step)
        if _all_ranks(found is not None, context):
            return found
    raise JobError(
        f"{store.uri}: each checkpoint was deleted before all workers had read it; stop any other job that writes there"
    )


def _load_if_present(store: Store, step: int) -> Checkpoint | None:
    try:
        return retry_during_outage(lambda: load_checkpoint(store, step))
    except ObjectMissing:
        return None


def _all_ranks(one: bool, context: WorkerContext) -> bool:
    """Whether `one` is true on every rank. A collective call."""
    votes = torch.tensor([int(one)], dtype=torch.int64, device=context.device)
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)


def _broadcast_from_rank_0(number: int, context: WorkerContext) -> int:
    """Rank 0's `number`, on every rank. A collective call."""
    value = torch.tensor([number], dtype=torch.int64, device=context.device)
    dist.broadcast(value, src=0)
    return int(value)


def _loader(task: TrainTask, context: WorkerContext) -> Loader:
    config = task.config
    index = retry_during_outage(lambda: load_index(config.data.uri))
    if index.digest != task.data_digest:
        raise DamageError(f"{config.data.uri}: its index changed since the job started; start the job again")
    with_rows = config.distillation is not None and config.distillation.pairs is not None
    return Loader(
        config.reading(), index, config.seed, config.global_batch, context.rank, context.world, with_rows
    )


def _warm_up(trainer: Trainer, state: TrainState, context: WorkerContext) -> None:
    """One forward and backward pass whose gradient is discarded.

    DDP regroups the gradients it sends together after its first pass, and with three or more workers the grouping
    decides the order of a sum. Without this pass the first step after a restart would differ in its last bits
    from the same step of an undisturbed run.
    """
    if context.world == 1:
        return
    config = trainer.config
    share = config.global_batch // context.world
    edge = config.data.crop or config.net.image_size
    blank = Batch(
        step=0,
        positions=torch.zeros(share, dtype=torch.int64),
        images=torch.zeros(share, config.net.in_channels, edge, edge, dtype=torch.uint8),
        labels=torch.zeros(share, dtype=torch.int64),
        wait_seconds=0.0,
    )
    terms, _ = chunk_loss(trainer, trainer.split(blank)[-1])
    terms.per_sample.sum().backward()
    state.optimizer.zero_grad(set_to_none=True)


def train_local(task: TrainTask, progress: Progress, stop: threading.Event) -> None:
    """Train here as the only worker, on a GPU if the settings ask for one; ends early once `stop` is set."""
    workers = task.config.workers
    set_up_arithmetic(task.config.matmul, deterministic=task.config.deterministic)
    device = torch.device("cuda" if workers.gpus_per_worker else "cpu")
    torch.set_num_threads(workers.cpus_per_worker * workers.most)
    context = WorkerContext(rank=0, world=1, device=device, node="node0")
    train_worker(task, context, _LocalDriver(task.config.steps, progress, stop))


class _LocalDriver:
    """The driver of a training in this process, as the worker sees it."""

    def __init__(self, total: int, progress: Progress, stop: threading.Event) -> None:
        self._total, self._progress, self._stop = total, progress, stop

    def report(self, step: int, note: str) -> None:
        self._progress(step, self._total, note)

    def should_stop(self) -> bool:
        return self._stop.is_set()
