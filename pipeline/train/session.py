"""A training from one step to another: takes the steps, and at their marks logs, draws, saves and asks to go on."""

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.data import Loader
from pipeline.train.checkpoint import CheckpointWriter
from pipeline.train.diary import Diary
from pipeline.train.grid import draw_grid
from pipeline.train.loop import Trainer
from pipeline.train.lr import learning_rate
from pipeline.train.state import TrainState
from pipeline.train.window import Window, close_window

Report = Callable[[int, str], bool]
"""Rank 0 tells (finished steps, a short text) and hears whether to stop."""

OnProgress = Callable[[int, int, str], None]
"""The driver's caller hears (finished steps, all steps, a short text)."""

GRID = "samples"


@dataclass
class Session:
    """One worker's way through the steps. All that only rank 0 does, it does without collective calls."""

    trainer: Trainer
    state: TrainState
    diary: Diary
    writer: CheckpointWriter
    report: Report
    leads: bool
    """Whether this is rank 0, which draws, saves and reports."""
    window: Window = field(init=False)

    def __post_init__(self) -> None:
        self.window = Window(self.trainer.schedule.T, self.trainer.device)

    def run(self, loader: Loader) -> None:
        """Take the steps that are left; ends early, with a checkpoint, when asked to stop."""
        config, state = self.trainer.config, self.state
        stop = self.leads and self.report(state.step, "")
        if state.step == 0:
            self._draw()
        self.window.reset()
        batches = loader.batches(state.step, config.steps)
        for step in self.trainer.steps(state, batches, self.window):
            last = step == config.steps
            stopping = False
            if last or step % config.log_every_steps == 0:
                stopping, stop = self._close_window(step, stop)
            if last or step % config.grid.every_steps == 0:
                self._draw()
            if last or stopping or step % config.checkpoint.every_steps == 0:
                self._save()
            if stopping:
                break
        self.writer.wait()

    def _close_window(self, step: int, stop: bool) -> tuple[bool, bool]:
        """Log the window. Returns (whether all ranks stop now, whether rank 0 has been asked to)."""
        config = self.trainer.config
        metrics, stopping = close_window(self.window, config.global_batch, stop)
        metrics["train/lr"] = learning_rate(config.optimizer, step - 1, config.steps)
        if self.leads:
            # the first point of a training would flatten every chart: the loss falls from 1, caches are cold
            if step > config.log_every_steps or step == config.steps:
                self.diary.metrics(step, metrics)
            text = f"loss {metrics['train/loss']:.4f}  {metrics['perf/images_per_s']:,.0f} images/s"
            stop = self.report(step, text)
        self.window.reset()
        return stopping, stop

    def _draw(self) -> None:
        if self.leads:
            self.diary.image(GRID, self.state.step, draw_grid(self.trainer, self.state))

    def _save(self) -> None:
        if self.leads:
            self.writer.submit(self.state.step, self.state.tensors() | self.diary.tensors())
