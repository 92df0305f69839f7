"""One worker's steps, and what happens at intervals: metrics, sample grids, checkpoints, and the vote to stop."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_pipeline.data.reading.loader import Loader, resilient_batches
from ddpm_pipeline.devices.peak_flops import device_peak_flops
from ddpm_pipeline.telemetry.logs import name_process
from ddpm_pipeline.telemetry.prometheus import JobMetrics
from ddpm_pipeline.train.checkpoint import CheckpointWriter
from ddpm_pipeline.train.checkpoint_eval import FixedEvaluation, draw_grid
from ddpm_pipeline.train.data_parallel import gathered, is_divided
from ddpm_pipeline.train.loop import Trainer
from ddpm_pipeline.train.memory import largest_micro_batch, worker_memory_bytes
from ddpm_pipeline.train.rank_watch import RankMarker
from ddpm_pipeline.train.run_logger import RunLogger
from ddpm_pipeline.train.state import TrainState, learning_rate
from ddpm_pipeline.train.step_metrics import StepMetrics
from ddpm_pipeline.train.teacher import training_flops

log = logging.getLogger(__name__)

GRID = "samples"
PROMETHEUS_GAUGES = {
    "ddpm_images_per_second": "perf/images_per_s",
    "ddpm_step_seconds": "perf/step_seconds",
    "ddpm_data_wait_share": "perf/data_wait_share",
    "ddpm_loss": "train/loss",
    "ddpm_mfu": "perf/mfu",
}
"""Prometheus gauges, and the metrics that they show; `perf/mfu` is there on known GPUs only."""
EVAL_LOSS = "eval/loss"


class Driver(Protocol):
    """The driver of the training as rank 0 sees it. Neither call may block."""

    def report(self, step: int, note: str) -> None:
        """Report finished steps, and a short text."""
        ...

    def should_stop(self) -> bool:
        """Whether to save a checkpoint and end."""
        ...


class Session:
    """Runs one worker's steps. What only rank 0 does, it does without collective calls.

    Where the workers have parts of the network, all draw and evaluate: no device could hold the whole for long, and the
    others would wait anyway. Rank 0 publishes.
    """

    def __init__(
        self,
        trainer: Trainer,
        state: TrainState,
        run_logger: RunLogger,
        writer: CheckpointWriter,
        driver: Driver | None,
        marker: RankMarker | None = None,
    ) -> None:
        """`driver`: given on rank 0, which draws, saves and reports; None on the others. `marker`: given under Ray."""
        self._trainer, self._state, self._run_logger, self._writer = trainer, state, run_logger, writer
        self._driver, self._marker = driver, marker
        self._evaluates = driver is not None or is_divided(state.net)
        self._window = StepMetrics(trainer.schedule.T, trainer.device)
        self._vote = StopVote()
        self._prometheus = JobMetrics("train", trainer.config.name)
        self._evaluation: FixedEvaluation | None = None
        self._peak_flops = device_peak_flops(trainer.device, trainer.config.precision)
        self._flops = 0 if self._peak_flops is None else training_flops(trainer.config)

    def run(self, loader: Loader, tensors: Mapping[str, Tensor]) -> None:
        """Take the remaining steps; ends early, with a checkpoint, when the driver requests it.

        `tensors`: of the checkpoint that this resumes from, which may hold a part of a window.
        """
        config, state = self._trainer.config, self._state
        self._window.load(tensors, leads=self._driver is not None)
        if self._driver is not None:
            self._driver.report(state.step, "")
        if self._evaluates:
            self._evaluation = FixedEvaluation(self._trainer, loader.config, loader.index)
        if state.step == 0:
            self._draw()
        batches = resilient_batches(loader, state.step, config.steps)
        if self._marker is not None:
            self._marker.finished(state.step)
            batches = self._marker.of_data(batches)
        with closing(self._trainer.steps(state, batches, self._window)) as steps:
            self._take(steps)
        self._writer.wait()

    def _take(self, steps: Iterable[int]) -> None:
        """Take the steps, and do what is due after each."""
        config, state = self._trainer.config, self._state
        for step in steps:
            name_process(step=step)
            if self._marker is not None:
                self._marker.finished(step)
            last = step == config.steps
            stopping = self._vote.decide(self._driver is not None and self._driver.should_stop()) and not last
            window_ends = last or step % config.log_every_steps == 0
            draws = last or step % config.grid.every_steps == 0
            at_interval = last or step % config.checkpoint.every_steps == 0
            if window_ends or draws or at_interval or stopping:
                self._trainer.finish_step(state, self._window)
            if window_ends:
                self._close_window(step)
            elif stopping:
                self._window.reduce()
            if draws:
                self._draw()
            if at_interval or stopping:
                # not evaluated at a stop in between: an undisturbed training would have no such point
                self._save({} if window_ends else self._window.tensors(), evaluate=at_interval)
            if stopping:
                break

    def _close_window(self, step: int) -> None:
        config = self._trainer.config
        self._window.reduce()
        metrics = self._window.metrics(config.global_batch)
        metrics["train/lr"] = learning_rate(config.optimizer, step - 1, config.steps)
        metrics["perf/micro_batch"] = largest_micro_batch(config, self._trainer.world)
        if self._peak_flops is not None:
            peak = self._peak_flops * self._trainer.world
            metrics["perf/mfu"] = metrics["perf/images_per_s"] * self._flops / peak
        self._window.reset()
        self._prometheus.add_counted()
        if self._driver is None:
            return
        # skip the first point, which would flatten every chart: the loss falls from 1, caches are cold
        if step > config.log_every_steps or step == config.steps:
            self._run_logger.metrics(step, metrics)
        speed = f"{metrics['perf/images_per_s']:,.0f} images/s"
        for gauge, chart in PROMETHEUS_GAUGES.items():
            if chart in metrics:
                self._prometheus.gauge(gauge, metrics[chart])
        self._prometheus.gauge("ddpm_step", step)
        log.info("loss %.4f, %s", metrics["train/loss"], speed)
        self._driver.report(step, f"loss {metrics['train/loss']:.4f}  {speed}")

    def _draw(self) -> None:
        if not self._evaluates:
            return
        self._make_room()
        grid = draw_grid(self._trainer, self._state)
        if self._driver is not None:
            self._run_logger.image(GRID, self._state.step, grid)
            if self._state.step == self._trainer.config.steps:
                self._run_logger.final_image(grid)

    def _make_room(self) -> None:
        trainer = self._trainer
        if trainer.captured is not None:
            trainer.captured.make_room(worker_memory_bytes(trainer.config.workers, trainer.device))

    def _save(self, window: Mapping[str, Tensor], evaluate: bool) -> None:
        if not self._evaluates:
            return
        self._make_room()
        loss = self._evaluation.loss(self._state) if evaluate and self._evaluation is not None else None
        if loss is not None and self._driver is not None:
            self._run_logger.metrics(self._state.step, {EVAL_LOSS: loss})
        if is_divided(self._state.net):
            self._writer.wait()  # or there might be two whole states in memory
        tensors = gathered(self._state.tensors(), keep=self._driver is not None)
        if self._driver is not None:
            tensors = tensors | self._run_logger.tensors() | dict(window)
            self._state.read_until = self._writer.submit(self._state.step, tensors, loss)


class StopVote:
    """Agreement to stop: every worker learns at the same step that any of them was asked to.

    One asynchronous all-reduce of one number per step, overlapped with the next step, so that nobody waits for it.
    All ranks construct it and call `decide` once per step. It uses a gloo group of its own: on the device's group
    every step would wait for the device.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._votes = torch.zeros(1)
        self._pending: dist.Work | None = None

    def decide(self, requested: bool) -> bool:
        """Send this rank's vote for the next step; returns whether any rank requested a stop one step ago."""
        if self._group is None:
            return requested
        agreed = False
        if self._pending is not None:
            self._pending.wait()
            agreed = bool(self._votes > 0)
        self._votes = torch.full((1,), float(requested))
        self._pending = dist.all_reduce(self._votes, group=self._group, async_op=True)
        return agreed
