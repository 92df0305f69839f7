"""How long a training takes: a few real steps here, on made-up images, counted up.

The steps are the loop's own. A network whose sample would take long is measured on smaller images and scaled by its
operations, so that the answer comes within about twenty seconds.
"""

import time
from dataclasses import dataclass

import psutil
import torch

from pipeline.config.training import TrainConfig
from pipeline.data.reading.loader import Batch
from pipeline.diffusion import NoiseSchedule
from pipeline.train.loop import Trainer, chunk_loss, train_step
from pipeline.train.memory import largest_micro_batch
from pipeline.train.requirements import sample_flops, state_memory
from pipeline.train.state import TrainState, initial_state
from pipeline.train.step_metrics import StepMetrics

LARGEST_SAMPLE_FLOPS = 1e11
"""Of the images that are measured: a second or two of one core, milliseconds of a GPU."""
LARGEST_HALF_ON_CPU = 2e9
"""The same for bfloat16 on a CPU, which may have to emulate it."""
BUDGET_SECONDS = 6.0
MOST_SAMPLES = 16


@dataclass(frozen=True)
class Pace:
    """What was measured."""

    sample_seconds: float
    """Forward and backward pass of one sample of the full size."""
    update_seconds: float
    """What a step takes beside that: clipping, optimiser, averages."""
    samples: int
    """In the measured batch."""
    image_size: int
    """Edge of the measured images; less than the training's where its own would take long."""
    threads: int
    peak_bytes: int | None
    """Largest allocation of the measured step on a GPU; None on a CPU."""

    def step_seconds(self, samples: int) -> float:
        """A step of a worker whose share is `samples`."""
        return samples * self.sample_seconds + self.update_seconds


def measure_pace(config: TrainConfig, device: torch.device, flops: int) -> Pace | None:
    """Take some steps of one worker here; None when its state alone would fill most of this machine's memory.

    flops: of one sample of the full size (`sample_flops`).
    """
    if state_memory(config).total > 0.6 * psutil.virtual_memory().available:
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(min(config.workers.cpus_per_worker, psutil.cpu_count() or 1))
    try:
        return _measure(config, device, flops)
    finally:
        torch.set_num_threads(threads)


def probed_size(config: TrainConfig, device: torch.device, flops: int) -> int:
    """Edge of the images to measure: the training's, halved until a sample is quick and the network's levels allow."""
    size = config.net.image_size
    coarsest = 2 ** (len(config.net.multipliers) - 1)
    emulated = device.type == "cpu" and config.precision == "bfloat16"
    most = LARGEST_HALF_ON_CPU if emulated else LARGEST_SAMPLE_FLOPS
    while flops > most and size % (2 * coarsest) == 0:
        size, flops = size // 2, flops // 4
    return size


def _measure(config: TrainConfig, device: torch.device, flops: int) -> Pace:
    deadline = time.monotonic() + BUDGET_SECONDS
    size = probed_size(config, device, flops)
    scale = 1.0 if size == config.net.image_size else flops / _flops_at(config, size)
    state = initial_state(config, device)
    schedule = NoiseSchedule.from_config(config.schedule)
    trainer = Trainer(config, schedule, state.net, device, config.workers.most)
    _step(trainer, state, _batch(config, 1, size))  # the first allocates and picks its kernels
    single = _pass(trainer, _batch(config, 1, size))
    count = max(
        1, min(MOST_SAMPLES, largest_micro_batch(config, trainer.world), int(BUDGET_SECONDS / 4 / single))
    )
    batch = _batch(config, count, size)
    passes = [single if count == 1 else _pass(trainer, batch)]
    steps = [_step(trainer, state, batch)]
    while time.monotonic() < deadline and len(steps) < 10:
        passes.append(_pass(trainer, batch))
        steps.append(_step(trainer, state, batch))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Pace(
        sample_seconds=min(passes) / count * scale,
        update_seconds=max(0.0, min(steps) - min(passes)),
        samples=count,
        image_size=size,
        threads=torch.get_num_threads(),
        peak_bytes=peak,
    )


def _pass(trainer: Trainer, batch: Batch) -> float:
    """Seconds of a forward and backward pass, whose gradient is thrown away."""
    began = _now(trainer.device)
    terms, _ = chunk_loss(trainer, batch)
    terms.per_sample.sum().backward()
    seconds = _now(trainer.device) - began
    trainer.network.zero_grad(set_to_none=True)
    return seconds


def _step(trainer: Trainer, state: TrainState, batch: Batch) -> float:
    """Seconds of a whole step."""
    began = _now(trainer.device)
    train_step(trainer, state, batch, StepMetrics(trainer.schedule.T, trainer.device))
    return _now(trainer.device) - began


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _batch(config: TrainConfig, count: int, size: int) -> Batch:
    return Batch(
        step=0,
        positions=torch.arange(count),
        images=torch.zeros(count, config.net.in_channels, size, size, dtype=torch.uint8),
        labels=torch.zeros(count, dtype=torch.int64),
        wait_seconds=0.0,
    )


def _flops_at(config: TrainConfig, size: int) -> int:
    """Operations of a sample of this edge; attention stands where it stands in the full size's levels."""
    net = config.net
    shrink = net.image_size // size
    there = tuple(resolution // shrink for resolution in net.attention_resolutions)
    return sample_flops(net.model_copy(update={"image_size": size, "attention_resolutions": there}))
