"""What is computed at a checkpoint: eval/loss of the averaged weights, and a grid of samples.

The training loss of a window is noisy: its samples, timesteps and noise differ each time. eval/loss always uses the
same: the samples at the first positions of the global order, timesteps spread evenly over the schedule, noise by name.
These samples are also trained on, so it ranks the checkpoints of one training and says nothing about overfitting
(docs/quality.md has measures that do). The grids use fixed seeds, so that they differ by the training only.
"""

import math
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_pipeline.config.data import DataConfig
from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig
from ddpm_pipeline.data.formats.contact_sheet import image_grid, in_rows
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.data.index import Index
from ddpm_pipeline.data.reading.samples import SampleSource
from ddpm_pipeline.diffusion import from_uint8, sample, to_uint8, training_loss
from ddpm_pipeline.diffusion.noise import Stream, normal
from ddpm_pipeline.diffusion.objective import Net
from ddpm_pipeline.store import retry_during_outage
from ddpm_pipeline.train.loop import Trainer
from ddpm_pipeline.train.memory import largest_micro_batch
from ddpm_pipeline.train.state import TrainState

LARGEST_BATCH = 64
ONE_EVALUATION = SamplerConfig(kind="consistency", num_steps=1)
SHORTEST_EDGE = 256
"""Pixels. A smaller grid would be tiny on the run page."""


class FixedEvaluation:
    """Made and used by rank 0 alone, without collective calls, so the number of workers does not change the value."""

    def __init__(self, trainer: Trainer, data: DataConfig, index: Index) -> None:
        self._trainer, self._data, self._index = trainer, data, index
        self._samples: tuple[Tensor, Tensor | None] | None = None
        self._taught: Tensor | None = None

    def loss(self, state: TrainState) -> float | None:
        """Mean loss of the first average's weights; None when the settings ask for no samples."""
        count = self._trainer.config.checkpoint.eval_samples
        if count == 0:
            return None
        total = self._squared_distance(state, count) if self._trainer.teacher else self._loss(state, count)
        return total / count if math.isfinite(total) else math.nan

    def _squared_distance(self, state: TrainState, count: int) -> float:
        """Sum over samples of the mean squared distance between the student's images, by one evaluation, and the
        teacher's, by its sampler from the same noise."""
        index = torch.arange(count)
        if self._taught is None:
            self._taught = teacher_images(self._trainer, index)
        with state.average() as net:
            images = student_images(self._trainer, net, ONE_EVALUATION, index)
        return float((images - self._taught).double().square().flatten(1).mean(1).sum())

    def _loss(self, state: TrainState, count: int) -> float:
        """Sum over samples of the training loss."""
        config, device = self._trainer.config, self._trainer.device
        images, labels = self._read(count)
        size = min(LARGEST_BATCH, config.workers.micro_batch or LARGEST_BATCH)
        total = 0.0
        with state.average() as net:
            for positions in torch.arange(count).split(size):
                x0 = from_uint8(images[positions].to(device)).contiguous(memory_format=torch.channels_last)
                # the middle of one of `count` equal parts of the schedule for each sample
                t = ((2 * positions + 1) * self._trainer.schedule.T // (2 * count)).to(device)
                noise = normal(config.seed, Stream.EVALUATE_NOISE, positions.to(device), tuple(x0.shape[1:]))
                batch_labels = None if labels is None else labels[positions].to(device)
                with (
                    torch.no_grad(),
                    torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"),
                ):
                    terms = training_loss(
                        self._trainer.schedule, config.objective, net, x0, t, noise, batch_labels
                    )
                total += float(terms.per_sample.double().sum())
        return total

    def _read(self, count: int) -> tuple[Tensor, Tensor | None]:
        """The samples, read once: images uint8 (count, C, H, W), labels int64 (count,) if the network has classes."""
        if self._samples is None:
            with closing(SampleSource(self._reading(), self._index, self._trainer.config.seed)) as source:
                found = retry_during_outage(lambda: source.get(np.arange(count, dtype=np.int64)))
            has_classes = self._trainer.config.net.num_classes is not None
            self._samples = found.images, found.labels if has_classes else None
        return self._samples

    def _reading(self) -> DataConfig:
        """Read sample by sample where shards allow it: fetching whole shards for so few would take long."""
        if any(shard.compressed for shard in self._index.shards):
            return self._data.model_copy(update={"num_workers": 0})
        return self._data.model_copy(update={"num_workers": 0, "cache_dir": None, "memory_bytes": 0})


def draw_grid(trainer: Trainer, state: TrainState) -> Pixels:
    """A grid of images from the averaged weights, uint8 (H, W, 3); a student's are right of its teacher's."""
    config = trainer.config
    index = torch.arange(config.grid.count)
    with state.average() as net:
        drawn = [student_images(trainer, net, config.grid.sampler, index)]
    if trainer.teacher is not None:
        drawn.insert(0, teacher_images(trainer, index))
    blocks = [
        in_rows(list(to_uint8(images).permute(0, 2, 3, 1).numpy()), config.net.num_classes)
        for images in drawn
    ]
    rows = _side_by_side(blocks)
    size = config.net.image_size
    pixels = -(-SHORTEST_EDGE // min(len(rows), len(rows[0])))
    return image_grid(rows, cell=-(-pixels // size) * size, margin=0)


def student_images(trainer: Trainer, net: nn.Module, sampler: SamplerConfig, index: Tensor) -> Tensor:
    """Images of these indices by the trained network, float32 (n, C, H, W) on the CPU."""
    return _drawn(trainer, net, trainer.config.objective, sampler, index)


def teacher_images(trainer: Trainer, index: Tensor) -> Tensor:
    """Images of these indices by the teacher and its sampler. RuntimeError for a training without one."""
    teacher = trainer.teacher
    if teacher is None:
        raise RuntimeError("this training has no teacher")
    return _drawn(trainer, teacher.net, teacher.objective, teacher.sampler, index)


def _drawn(
    trainer: Trainer, net: Net, objective: ObjectiveConfig, sampler: SamplerConfig, index: Tensor
) -> Tensor:
    """In parts that need less memory than a training step: of a micro-batch, in the training's precision.

    An image's noise is named by its index, so the parts change how sums are rounded and nothing else.
    """
    config, device = trainer.config, trainer.device
    shape = (config.net.in_channels, config.net.image_size, config.net.image_size)
    classes = config.net.num_classes
    parts: list[Tensor] = []
    for names in index.to(device).split(_grid_part(trainer)):
        labels = None if classes is None else names % classes
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            images = sample(
                net,
                trainer.schedule,
                sampler,
                names,
                shape,
                config.seed,
                class_labels=labels,
                objective=objective,
            )
        parts.append(images.cpu())
    return torch.cat(parts)


def _side_by_side(blocks: Sequence[Sequence[Sequence[Pixels]]]) -> list[list[Pixels]]:
    """Rows of images of several blocks of equal shape next to each other, with a white column between them."""
    first, *others = blocks
    white = np.full_like(first[0][0], 255)
    rows = [[*row] for row in first]
    for block in others:
        rows = [[*left, white, *right] for left, right in zip(rows, block, strict=True)]
    return rows


def _grid_part(trainer: Trainer) -> int:
    """Images to sample at a time. On a CPU without a micro-batch, where memory is no limit, the whole grid."""
    config = trainer.config
    if config.workers.micro_batch is None and trainer.device.type == "cpu":
        return config.grid.count
    return largest_micro_batch(config, trainer.world)
