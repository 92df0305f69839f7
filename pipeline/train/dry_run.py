"""What `ddpm train … --dry-run` adds to the settings: parameters, operations, memory, steps, and an estimated duration.

The duration comes from a few real steps on this machine, on made-up images, and takes about twenty seconds at most. On
a CPU the time grows with the samples, so a few are measured, on smaller images where these would take long. On a GPU
launching kernels may take longer than computing, so whole micro-batches are measured, with deterministic algorithms
and without.
"""

import time
from dataclasses import dataclass, replace

import psutil
import torch

from ddpm_pipeline.config.training import TrainConfig, WorkerConfig
from ddpm_pipeline.data.reading.loader import Batch
from ddpm_pipeline.devices import set_up_arithmetic
from ddpm_pipeline.devices.peak_flops import device_peak_flops
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.nets import UNetConfig, build_net, parameter_count
from ddpm_pipeline.train.captured_gradients import WARM_STEPS, captured_gradients
from ddpm_pipeline.train.loop import Trainer, find_gradients, train_step
from ddpm_pipeline.train.memory import (
    activation_bytes,
    fitting_samples,
    largest_micro_batch,
    limit_device_memory,
    out_of_memory_in_one_line,
    state_memory,
    worker_memory_bytes,
)
from ddpm_pipeline.train.state import TrainState, initial_state
from ddpm_pipeline.train.step_metrics import StepMetrics
from ddpm_pipeline.train.teacher import make_teacher, training_flops

LARGEST_SAMPLE_FLOPS = 1e11
"""Of an image measured on a CPU: a second or two of one core."""
LARGEST_HALF_ON_CPU = 2e9
"""The same for bfloat16, which a CPU may have to emulate."""
BUDGET_SECONDS = 6.0
MAX_SAMPLES = 16
"""In a batch measured on a CPU."""


class NotMeasuredError(Exception):
    """No step could be run here; the message says why."""


@dataclass(frozen=True)
class TrainingEstimate:
    """The resources that a training will need."""

    parameters: int
    flops_per_step: int
    """Forward and backward pass of a global batch: convolutions and matrix products."""
    memory_bytes: int
    """Of one worker: weights, gradients, moments, averages, and the activations of a micro-batch."""
    memory_parts: dict[str, int]
    micro_batch: int
    steps: int
    """Of the whole training; existing checkpoints are not considered."""
    duration_seconds: float | None
    """None if no step could be run here."""
    duration_note: str
    """What the duration was measured on, and what it leaves out."""
    mfu: float | None = None
    """Operations a second over the GPU's peak (`ddpm_pipeline.devices.peak_flops`); None on a CPU or an unknown GPU."""
    deterministic_step_seconds: float | None = None
    """Duration of a step with deterministic algorithms; None where not measured on a GPU."""
    free_step_seconds: float | None = None
    """The same with any algorithms."""

    def lines(self) -> list[str]:
        """Aligned text; as comments, the settings around it stay valid YAML."""
        parts = ", ".join(f"{name} {_bytes(size)}" for name, size in self.memory_parts.items())
        known = self.duration_seconds is not None
        rows = {
            "parameters": f"{self.parameters:,}",
            "operations": f"{self.flops_per_step:.3g} per step, forward and backward",
            "memory": f"{_bytes(self.memory_bytes)} per worker: {parts}",
            "micro-batch": f"{self.micro_batch} samples at a time",
            "steps": f"{self.steps:,}",
            "duration": f"{_duration(self.duration_seconds or 0)}: {self.duration_note}"
            if known
            else f"not measured: {self.duration_note}",
        }
        if self.mfu is not None:
            rows["mfu"] = f"{self.mfu:.1%} of the GPU's peak, in the measured steps"
        fixed, free = self.deterministic_step_seconds, self.free_step_seconds
        if fixed is not None and free is not None:
            rows["arithmetic"] = (
                f"{fixed:.3g} s per step with deterministic=true, {free:.3g} s with false ({fixed / free - 1:+.0%})"
            )
        return [f"{name:<12}{text}" for name, text in rows.items()]


@dataclass(frozen=True)
class Pace:
    """Measured speed of one worker."""

    pass_seconds: float
    """Forward and backward pass of `samples` samples of the full size."""
    update_seconds: float
    """The rest of a step: clipping, optimizer, averages."""
    samples: int
    """In the measured batch."""
    image_size: int
    """Edge of the measured images; smaller than the training's where those would take long."""
    threads: int
    peak_bytes: int | None
    """Largest allocation of the measured step on a GPU; None on a CPU."""

    @property
    def sample_seconds(self) -> float:
        """A pass for each of its samples."""
        return self.pass_seconds / self.samples

    def step_seconds(self, samples: int) -> float:
        """Duration of a step of a worker whose share is `samples`."""
        on_gpu = self.peak_bytes is not None
        # a GPU may take as long for a part of a micro-batch as for a whole one
        passes = -(-samples // self.samples) if on_gpu else samples / self.samples
        return passes * self.pass_seconds + self.update_seconds


def estimate(config: TrainConfig) -> TrainingEstimate:
    """Compute what can be computed, and run a few steps here for the rest; needs no data and no service."""
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
        **({"collected weights": state.collected} if state.collected else {}),
        f"activations of {size}": size * activation_bytes(config.net, config.precision),
    }
    with torch.device("meta"):
        parameters = parameter_count(build_net(config.net))
    # without the GPU, bfloat16 would be emulated and the timing meaningless
    probed = config if gpu or not config.workers.gpus_per_worker else _plain(config)
    flops = training_flops(config)
    paces: dict[bool, Pace] = {}
    failure = ""
    try:
        paces = measure_modes(probed, device, flops)
    except NotMeasuredError as error:
        failure = str(error)
    pace = paces.get(config.deterministic)
    peak = device_peak_flops(device, config.precision)
    return TrainingEstimate(
        parameters=parameters,
        flops_per_step=config.global_batch * flops,
        memory_bytes=sum(parts.values()),
        memory_parts=parts,
        micro_batch=size,
        steps=config.steps,
        duration_seconds=None if pace is None else config.steps * pace.step_seconds(share),
        duration_note=failure if pace is None else _note(config, pace, device, share),
        mfu=None if pace is None or peak is None else share * flops / pace.step_seconds(share) / peak,
        deterministic_step_seconds=paces[True].step_seconds(share) if len(paces) == 2 else None,
        free_step_seconds=paces[False].step_seconds(share) if len(paces) == 2 else None,
    )


def _note(config: TrainConfig, pace: Pace, device: torch.device, share: int) -> str:
    threads = f"{pace.threads} thread{'s' * (pace.threads > 1)}"
    where = "this machine's GPU" if device.type == "cuda" else f"{threads} of this CPU"
    if device.type == "cpu" and config.workers.gpus_per_worker:
        where += ", in float32, because no GPU is available here"
    if pace.image_size != config.net.image_size:
        where += f", on {pace.image_size}-pixel images scaled by their operations"
    if pace.peak_bytes is not None:
        where += f", peak memory {_bytes(pace.peak_bytes)} with {pace.samples} samples"
    workers = config.workers.most
    beside = "" if workers == 1 else f", assuming {workers} workers as fast as one here"
    beside += "" if not config.compile else ", without torch.compile"
    return (
        f"{pace.step_seconds(share):.3g} s per step, measured on {where}{beside}; "
        "excludes data loading and communication"
    )


def _with_fitting_batch(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Settings with the micro-batch that this machine would choose as a worker; unchanged where a GPU is missing."""
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


def measure_modes(config: TrainConfig, device: torch.device, flops: int) -> dict[bool, Pace]:
    """Pace by `deterministic`: both values on a GPU, on a CPU the training's, which has no effect there.

    Raises NotMeasuredError.
    """
    if device.type == "cpu":
        return {config.deterministic: measure_pace(config, device, flops)}
    paces: dict[bool, Pace] = {}
    for deterministic in (True, False):  # cuBLAS reads what the first needs when the process first uses it
        set_up_arithmetic(config.matmul, deterministic=deterministic)
        paces[deterministic] = measure_pace(config, device, flops)
    return paces


def measure_pace(config: TrainConfig, device: torch.device, flops: int) -> Pace:
    """Run some steps of one worker here.

    flops: of one sample of the full size (`sample_flops`). Raises NotMeasuredError where memory is lacking.
    """
    _require_memory_for_state(config, device)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(config.workers.cpus_per_worker, psutil.cpu_count() or 1))
    try:
        with out_of_memory_in_one_line(config, config.workers.most):
            return _measure(config, device, flops)
    except UserError as error:
        raise NotMeasuredError(str(error)) from error
    finally:
        torch.set_num_threads(threads)


def _require_memory_for_state(config: TrainConfig, device: torch.device) -> None:
    # the measured steps are those of one process, which divides nothing
    alone = config.workers.sharding == "fsdp"
    state = state_memory(config, world=1 if alone else None).total
    whose = "all workers" if alone else "a worker"
    if device.type == "cuda":
        room, place = worker_memory_bytes(config.workers, device), "this machine's GPU"
    else:
        room, place = int(0.6 * psutil.virtual_memory().available), "this machine"
    if state > room:
        raise NotMeasuredError(
            f"the state of {whose}, {_bytes(state)}, does not fit {place}, where {_bytes(room)} may be used"
        )


def probed_size(config: TrainConfig, device: torch.device, flops: int) -> int:
    """Edge of the images to measure: the training's; on a CPU halved until a sample is quick, as far as the levels
    allow.
    """
    size = config.net.image_size
    if device.type == "cuda" or not isinstance(config.net, UNetConfig):
        return size  # another package's network may have weights for its size
    coarsest = 2 ** (len(config.net.multipliers) - 1)
    emulated = device.type == "cpu" and config.precision == "bfloat16"
    most = LARGEST_HALF_ON_CPU if emulated else LARGEST_SAMPLE_FLOPS
    while flops > most and size % (2 * coarsest) == 0:
        size, flops = size // 2, flops // 4
    return size


def _measure(config: TrainConfig, device: torch.device, flops: int) -> Pace:
    deadline = time.monotonic() + BUDGET_SECONDS
    if device.type == "cuda":
        limit_device_memory(config.workers, device)
        torch.cuda.reset_peak_memory_stats(device)
    size = probed_size(config, device, flops)
    scale = 1.0 if size == config.net.image_size else flops / _flops_at(config, size)
    state = initial_state(config, device)
    schedule = NoiseSchedule.from_config(config.schedule).to(device)
    teacher = None if config.distillation is None else (config.objective, initial_state(config, device).net)
    trainer = Trainer(
        config,
        schedule,
        state.net,
        device,
        config.workers.most,
        teacher=None if teacher is None else make_teacher(config, *teacher, device, world=1),
    )
    _step(trainer, state, _batch(config, 1, size))  # the first one allocates and selects kernels
    count = _measured_samples(trainer, _batch(config, 1, size))
    batch = _batch(config, count, size)
    trainer = replace(trainer, captured=captured_gradients(config, state.net, device, config.workers.most))
    for _ in range(1 if trainer.captured is None else WARM_STEPS + 1):
        _pass(trainer, batch)
    passes, steps = [_pass(trainer, batch)], [_step(trainer, state, batch)]
    while time.monotonic() < deadline and len(steps) < 10:
        passes.append(_pass(trainer, batch))
        steps.append(_step(trainer, state, batch))
    return Pace(
        pass_seconds=min(passes) * scale,
        update_seconds=max(0.0, min(steps) - min(passes)),
        samples=count,
        image_size=size,
        threads=torch.get_num_threads(),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _measured_samples(trainer: Trainer, one: Batch) -> int:
    """Samples in a measured pass: on a GPU as many as in a training's largest micro-batch, on a CPU what is quick.

    one: a batch of one sample.
    """
    size, share = largest_micro_batch(trainer.config, trainer.world), _share(trainer.config)
    if trainer.device.type == "cuda":
        return -(-share // -(-share // size))  # micro-batches are as equal as possible
    return max(1, min(MAX_SAMPLES, size, int(BUDGET_SECONDS / 4 / _pass(trainer, one))))


def _pass(trainer: Trainer, batch: Batch) -> float:
    """Seconds of a forward and backward pass; the gradient is discarded."""
    began = _now(trainer.device)
    find_gradients(trainer, batch)
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
    """Operations of a sample of this edge, with attention at the same levels as in the full size."""
    net = config.net
    assert isinstance(net, UNetConfig)  # others are measured in full size
    shrink = net.image_size // size
    resolutions = tuple(resolution // shrink for resolution in net.attention_resolutions)
    smaller = net.model_copy(update={"image_size": size, "attention_resolutions": resolutions})
    return training_flops(config.model_copy(update={"net": smaller}))
