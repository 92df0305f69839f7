"""A training from one step to another: takes the steps, and at their marks logs, draws, saves and asks to go on."""

import logging
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.reading.loader import Loader, resilient_batches
from pipeline.telemetry.logs import name_process
from pipeline.telemetry.prometheus import JobMetrics
from pipeline.train.checkpoint import CheckpointWriter
from pipeline.train.checkpoint_eval import FixedEvaluation, draw_grid
from pipeline.train.loop import Trainer
from pipeline.train.memory import largest_micro_batch
from pipeline.train.run_logger import RunLogger
from pipeline.train.state import TrainState, learning_rate
from pipeline.train.step_metrics import StepMetrics

log = logging.getLogger(__name__)

GRID = "samples"
METERED = {
    "ddpm_images_per_second": "perf/images_per_s",
    "ddpm_step_seconds": "perf/step_seconds",
    "ddpm_data_wait_share": "perf/data_wait_share",
    "ddpm_loss": "train/loss",
}
"""Points of charts that Prometheus is told, too."""
EVAL_LOSS = "eval/loss"


class Driver(Protocol):
    """Whoever runs the training, as rank 0 sees it. Neither call may wait."""

    def tell(self, step: int, note: str) -> None:
        """Hear how far the training is, and a short text."""
        ...

    def asks_to_stop(self) -> bool:
        """Whether the training shall save and end."""
        ...


class Session:
    """One worker's way through the steps. What only rank 0 does, it does without collective calls."""

    def __init__(
        self,
        trainer: Trainer,
        state: TrainState,
        diary: RunLogger,
        writer: CheckpointWriter,
        driver: Driver | None,
    ) -> None:
        """`driver`: given on rank 0, which draws, saves and reports; None on the others."""
        self._trainer, self._state, self._diary, self._writer = trainer, state, diary, writer
        self._driver = driver
        self._window = StepMetrics(trainer.schedule.T, trainer.device)
        self._vote = StopVote()
        self._meters = JobMetrics("train", trainer.config.name)
        self._evaluation: FixedEvaluation | None = None

    def run(self, loader: Loader, tensors: Mapping[str, Tensor]) -> None:
        """Take the steps that are left; ends early, with a checkpoint, when the driver asks.

        `tensors`: of the checkpoint this goes on from, which may hold the beginning of a window.
        """
        config, state = self._trainer.config, self._state
        self._window.load(tensors, leads=self._driver is not None)
        if self._driver is not None:
            self._driver.tell(state.step, "")
            self._evaluation = FixedEvaluation(self._trainer, loader.config, loader.index)
        if state.step == 0:
            self._draw()
        batches = resilient_batches(loader, state.step, config.steps)
        for step in self._trainer.steps(state, batches, self._window):
            name_process(step=step)
            last = step == config.steps
            stopping = (
                self._vote.decide(self._driver is not None and self._driver.asks_to_stop()) and not last
            )
            window_ends = last or step % config.log_every_steps == 0
            if window_ends:
                self._close_window(step)
            elif stopping:
                self._window.reduce()
            if last or step % config.grid.every_steps == 0:
                self._draw()
            marked = last or step % config.checkpoint.every_steps == 0
            if marked or stopping:
                # a stop in between is no mark: an undisturbed training would have no such point
                self._save({} if window_ends else self._window.tensors(), evaluate=marked)
            if stopping:
                break
        self._writer.wait()

    def _close_window(self, step: int) -> None:
        config = self._trainer.config
        self._window.reduce()
        metrics = self._window.metrics(config.global_batch)
        metrics["train/lr"] = learning_rate(config.optimizer, step - 1, config.steps)
        metrics["perf/micro_batch"] = largest_micro_batch(config, self._trainer.world)
        self._window.reset()
        self._meters.add_counted()
        if self._driver is None:
            return
        # the first point of a training would flatten every chart: the loss falls from 1, caches are cold
        if step > config.log_every_steps or step == config.steps:
            self._diary.metrics(step, metrics)
        speed = f"{metrics['perf/images_per_s']:,.0f} images/s"
        for meter, chart in METERED.items():
            self._meters.gauge(meter, metrics[chart])
        self._meters.gauge("ddpm_step", step)
        log.info("loss %.4f, %s", metrics["train/loss"], speed)
        self._driver.tell(step, f"loss {metrics['train/loss']:.4f}  {speed}")

    def _draw(self) -> None:
        if self._driver is not None:
            grid = draw_grid(self._trainer, self._state)
            self._diary.image(GRID, self._state.step, grid)
            if self._state.step == self._trainer.config.steps:
                self._diary.final_image(grid)

    def _save(self, window: Mapping[str, Tensor], evaluate: bool) -> None:
        if self._driver is None:
            return
        loss = self._evaluation.loss(self._state) if evaluate and self._evaluation is not None else None
        if loss is not None:
            self._diary.metrics(self._state.step, {EVAL_LOSS: loss})
        tensors = self._state.tensors() | self._diary.tensors() | dict(window)
        self._writer.submit(self._state.step, tensors, loss)


class StopVote:
    """A one-number exchange a step, on its way while the next step computes, so that nobody waits for it.

    All ranks construct it and call `decide` once a step. It has a group of its own, on gloo, because the device's
    group would make every step wait for the device.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._ballot = torch.zeros(1)
        self._sent: dist.Work | None = None

    def decide(self, asked: bool) -> bool:
        """Cast this rank's vote for the next step; returns whether any rank asked by the step before."""
        if self._group is None:
            return asked
        agreed = False
        if self._sent is not None:
            self._sent.wait()
            agreed = bool(self._ballot > 0)
        self._ballot = torch.full((1,), float(asked))
        self._sent = dist.all_reduce(self._ballot, group=self._group, async_op=True)
        return agreed
