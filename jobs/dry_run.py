"""What `ddpm train … --dry-run` says beside the settings: size, arithmetic, memory, steps, duration."""

from dataclasses import dataclass

import torch

from pipeline.config.training import TrainConfig, WorkerConfig
from pipeline.nets import UNet, parameter_count
from pipeline.train.duration import Pace, measure_pace
from pipeline.train.memory import fitting_samples, largest_micro_batch, worker_memory_bytes
from pipeline.train.requirements import activation_bytes, sample_flops, state_memory


@dataclass(frozen=True)
class TrainingEstimate:
    """A training in numbers, before it begins."""

    parameters: int
    flops_per_step: int
    """Forward and backward pass of a global batch: convolutions and matrix products."""
    memory_bytes: int
    """Of one worker: weights, gradients, moments, averages, and the activations of a micro-batch."""
    memory_parts: dict[str, int]
    micro_batch: int
    steps: int
    """Of the whole training; what checkpoints already hold is not looked up."""
    duration_seconds: float | None
    """None where no step could be taken here."""
    duration_note: str
    """What the duration was measured on, and what it leaves out."""

    def lines(self) -> list[str]:
        """For people, aligned; as comments they leave the settings beside them readable as YAML."""
        parts = ", ".join(f"{name} {_bytes(size)}" for name, size in self.memory_parts.items())
        known = self.duration_seconds is not None
        rows = {
            "parameters": f"{self.parameters:,}",
            "operations": f"{self.flops_per_step:.3g} a step, forward and backward",
            "memory": f"{_bytes(self.memory_bytes)} a worker: {parts}",
            "micro-batch": f"{self.micro_batch} samples at a time",
            "steps": f"{self.steps:,}",
            "duration": f"{_duration(self.duration_seconds or 0)}: {self.duration_note}"
            if known
            else f"not measured: {self.duration_note}",
        }
        return [f"{name:<12}{text}" for name, text in rows.items()]


def estimate(config: TrainConfig) -> TrainingEstimate:
    """Compute what can be computed, and take a few steps here for the rest; needs no data and no service."""
    gpu = config.workers.gpus_per_worker > 0 and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    config = _with_fitting_batch(config, device)
    size, share = largest_micro_batch(config, config.workers.most), _share(config)
    state = state_memory(config)
    parts = {
        "weights": state.weights,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "averages": state.averages,
        f"activations of {size}": size * activation_bytes(config.net, config.precision),
    }
    with torch.device("meta"):
        parameters = parameter_count(UNet(config.net))
    # bfloat16 for a GPU that is not here would be emulated, and say nothing
    probed = config if gpu or not config.workers.gpus_per_worker else _plain(config)
    flops = sample_flops(config.net)
    pace = measure_pace(probed, device, flops)
    return TrainingEstimate(
        parameters=parameters,
        flops_per_step=config.global_batch * flops,
        memory_bytes=sum(parts.values()),
        memory_parts=parts,
        micro_batch=size,
        steps=config.steps,
        duration_seconds=None if pace is None else config.steps * pace.step_seconds(share),
        duration_note=_note(config, pace, device, share),
    )


def _note(config: TrainConfig, pace: Pace | None, device: torch.device, share: int) -> str:
    if pace is None:
        return f"the state of a worker, {_bytes(state_memory(config).total)}, does not fit this machine"
    threads = f"{pace.threads} thread{'s' * (pace.threads > 1)}"
    where = "this machine's GPU" if device.type == "cuda" else f"{threads} of this CPU"
    if device.type == "cpu" and config.workers.gpus_per_worker:
        where += ", for want of the GPU the settings ask for, in float32"
    if pace.image_size != config.net.image_size:
        where += f", on {pace.image_size}-pixel images scaled by their operations"
    if pace.peak_bytes is not None:
        where += f", peak memory {_bytes(pace.peak_bytes)} with {pace.samples} samples"
    workers = config.workers.most
    beside = "" if workers == 1 else f", if each of {workers} workers is as fast as one here"
    beside += "" if not config.compile else ", before torch.compile"
    return (
        f"{pace.step_seconds(share):.3g} s a step, measured on {where}{beside}; data and exchange not counted"
    )


def _with_fitting_batch(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The micro-batch that a worker like this machine would derive; where a GPU is missing, the share as it is."""
    workers = config.workers
    if workers.micro_batch is not None or (workers.gpus_per_worker and device.type == "cpu"):
        return config
    fits = fitting_samples(config, worker_memory_bytes(workers, device))
    return config if fits >= _share(config) else _with_workers(config, micro_batch=fits)


def _plain(config: TrainConfig) -> TrainConfig:
    return config.model_copy(update={"precision": "float32"})


def _with_workers(config: TrainConfig, **changes: object) -> TrainConfig:
    workers = WorkerConfig.model_validate(config.workers.model_dump() | changes)
    return config.model_copy(update={"workers": workers})


def _share(config: TrainConfig) -> int:
    return -(-config.global_batch // config.workers.most)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"about {seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"about {seconds / 60:.0f} minutes"
    if seconds < 2 * 86400:
        return f"about {seconds / 3600:.0f} hours"
    return f"about {seconds / 86400:.0f} days"
