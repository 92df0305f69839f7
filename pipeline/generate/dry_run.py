"""What `ddpm generate … --dry-run` adds to the settings: evaluations of the network, device time, price and duration.

Evaluations follow from sampler and schedule. For the rest the generation's network runs here for a few seconds, if the
model can be read and the device of the settings is there: whole batches where these are quick, otherwise a few
evaluations of the network. On a CPU the time grows with the images, so a batch that would take long is cut.
"""

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm_pipeline.config.diffusion import ScheduleConfig
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.devices import is_out_of_memory
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.diffusion.evaluations import network_evaluations
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.generate.engine import Engine, set_up_torch
from ddpm_pipeline.generate.generation_cost import PER_IMAGES, amount
from ddpm_pipeline.generate.guards import GuardTripped
from ddpm_pipeline.generate.launched_images import LaunchedImages
from ddpm_pipeline.generate.model_source import ResolvedModel, find_model, registered_name
from ddpm_pipeline.generate.spec import Spec, make_spec
from ddpm_pipeline.nets.flops import forward_flops
from ddpm_pipeline.nets.model_files import build_model
from ddpm_pipeline.tracking import TrackingError, require_server

BUDGET_SECONDS = 6.0
WHOLE_BATCH_SECONDS = 1.0
"""Whole batches are timed where one takes at most this."""
LARGEST_IMAGE_FLOPS = 5e10
"""Of an evaluation of one image on a CPU: about a second of one core."""
LARGEST_HALF_ON_CPU = 1e9
"""The same for 16-bit numbers, which a CPU may have to emulate."""
_MIN_CALLS = 3
_WARM_UP_BATCHES = 2  # on a GPU kernels are chosen in the first batch, and captured in the second
_MIN_BATCHES, _MAX_BATCHES = 2, 50


class NotMeasuredError(Exception):
    """The network could not run here; the message says why."""


class _EnoughError(Exception):
    """Enough evaluations have been timed."""


@dataclass(frozen=True)
class SamplingPace:
    """Measured speed of one device."""

    image_seconds: float
    """Device time of an image: all its evaluations, and the sampler's arithmetic."""
    note: str
    """What was measured."""


@dataclass(frozen=True)
class GenerationEstimate:
    """What a generation will cost. Of the whole generation: existing shards are not considered."""

    model: str
    """`name/version` or the folder; what the settings say where the model was not found."""
    images: int
    evaluations_per_image: int | None
    """None where they depend on the schedule of a model that was not found."""
    device_seconds_per_1000: float | None
    """Seconds of one device per 1,000 images; None if nothing was measured."""
    device_seconds: float | None
    """In total."""
    money_per_1000: float | None
    """Price of 1,000 images; None without a price in the settings."""
    money: float | None
    """In total."""
    currency: str
    duration_seconds: float | None
    """With `num_workers` workers as fast as the one here."""
    note: str
    """What was measured, or why nothing was."""

    def lines(self) -> list[str]:
        """Aligned text; as comments, the settings around it stay valid YAML."""
        evaluations, seconds, total = (
            self.evaluations_per_image,
            self.device_seconds_per_1000,
            self.device_seconds,
        )
        rows = {
            "model": self.model,
            "evaluations": "not known"
            if evaluations is None
            else f"{evaluations:,} of the network per image",
            "device time": f"not measured: {self.note}"
            if seconds is None or total is None
            else f"{_span(seconds)} per 1,000 images, {_span(total)} for {self.images:,}: {self.note}",
        }
        if self.money_per_1000 is not None and self.money is not None:
            rows["price"] = (
                f"{amount(self.money_per_1000)} {self.currency} per 1,000 images, "
                f"{amount(self.money)} {self.currency} for {self.images:,}"
            )
        if self.duration_seconds is not None:
            rows["duration"] = (
                f"{_span(self.duration_seconds)} with the workers of the settings, each as fast as one here"
            )
        return [f"{name:<12}{text}" for name, text in rows.items()]


def estimate(config: GenerateConfig) -> GenerationEstimate:
    """Evaluations by computation, device time by a short measurement; writes nothing, and needs no cluster.

    UserError for settings that do not suit the model. A model or a device that is not at hand is no error: then nothing
    is measured, and the estimate says why.
    """
    model, pace, note = config.model, None, ""
    evaluations = None if config.sampler.guidance_interval else _evaluations(ScheduleConfig(), config)
    try:
        found = _find(config)
        model = found.name if found.version is None else f"{found.name}/{found.version}"
        evaluations = _evaluations(found.card.schedule, config)
        pace = measure_pace(config, found, _spec(config, found), evaluations)
    except NotMeasuredError as error:
        note = str(error)
    per_1000 = None if pace is None else PER_IMAGES * pace.image_seconds
    total = None if pace is None else config.count * pace.image_seconds
    devices = config.num_workers * (config.gpus_per_worker or 1)
    return GenerationEstimate(
        model=config.model if model == "local" else model,
        images=config.count,
        evaluations_per_image=evaluations,
        device_seconds_per_1000=per_1000,
        device_seconds=total,
        money_per_1000=None if per_1000 is None else config.cost.of(per_1000),
        money=None if total is None else config.cost.of(total),
        currency=config.cost.currency,
        duration_seconds=None if total is None else total / devices,
        note=note if pace is None else pace.note,
    )


def _span(seconds: float) -> str:
    return f"{amount(seconds)} s" if seconds < 7200 else f"{amount(seconds / 3600)} hours"


def _evaluations(schedule: ScheduleConfig, config: GenerateConfig) -> int:
    return network_evaluations(NoiseSchedule.from_config(schedule), config.sampler)


def _find(config: GenerateConfig) -> ResolvedModel:
    """The model of the settings. NotMeasuredError where it cannot be read now; a server that is down is not awaited."""
    try:
        if registered_name(config.model) is not None:
            require_server(wait_seconds=0)
        return find_model(config.model)
    except (UserError, DamageError, TrackingError) as error:
        raise NotMeasuredError(str(error)) from error


def _spec(config: GenerateConfig, model: ResolvedModel) -> Spec:
    device = "cuda" if config.gpus_per_worker else "cpu"
    return make_spec(config, model.card, name=model.name, version=model.version, device=device)


def measure_pace(config: GenerateConfig, model: ResolvedModel, spec: Spec, evaluations: int) -> SamplingPace:
    """Run the network of `model` for a few seconds as a worker would. Raises NotMeasuredError."""
    _require_feasible(spec, model)
    threads = torch.get_num_threads()
    try:
        set_up_torch(spec)
        net = build_model(model.card, model.weights, spec.device, where=config.model)
        engine = Engine(spec.model_copy(update={"compile": False}), net, model.card)
        return _Measurement(engine, net, evaluations).pace()
    except (UserError, GuardTripped) as error:  # the GPU cannot be used; the network makes no finite images
        raise NotMeasuredError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise NotMeasuredError("the memory here does not suffice for an image") from error
    finally:
        torch.set_num_threads(threads)


def _require_feasible(spec: Spec, model: ResolvedModel) -> None:
    """NotMeasuredError where the device is missing, or where a CPU would take too long for one evaluation."""
    if spec.device == "cuda":
        if not torch.cuda.is_available():
            raise NotMeasuredError("the generation samples on GPUs (gpus_per_worker), and there is none here")
        return
    flops = forward_flops(model.card.net) * (1 if spec.sampler.guidance_scale == 1 else 2)
    most = LARGEST_IMAGE_FLOPS if spec.dtype == "float32" else LARGEST_HALF_ON_CPU
    if flops > most:
        raise NotMeasuredError(
            f"an evaluation takes {flops:.2g} operations per image, too many for a dry run on this CPU"
        )


class _CallTimer:
    """Times the calls of a network, from the end of the first one, and ends the sampling when it has enough."""

    def __init__(self, device: torch.device, deadline: float) -> None:
        self._device, self._deadline = device, deadline
        self._began = 0.0
        self.seconds = 0.0
        self.calls = 0
        """Timed ones."""
        self.rows = 0
        """Evaluated in those calls."""
        self._is_warm = False

    def __call__(self, net: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.monotonic()
        if not self._is_warm:  # the first call allocates and chooses kernels
            self._began, self._is_warm = now, True
            return
        self.seconds = now - self._began
        self.calls += 1
        self.rows += len(args[0])
        if self.calls >= _MIN_CALLS and now > self._deadline:
            raise _EnoughError


class _Measurement:
    """Times one engine."""

    def __init__(self, engine: Engine, net: nn.Module, evaluations: int) -> None:
        self._engine, self._net, self._evaluations = engine, net, evaluations
        self._device = torch.device(engine.spec.device)
        self._deadline = time.monotonic() + BUDGET_SECONDS

    def pace(self) -> SamplingPace:
        """Seconds per image of whole batches or, where these take long, from single evaluations."""
        spec = self._engine.spec
        size = self._fitting_size()
        index = torch.arange(spec.first_index, spec.first_index + size)
        timer = self._time_calls(index, time.monotonic() + BUDGET_SECONDS / 4)
        image_seconds = self._evaluations * timer.seconds / timer.rows
        images = f"{size} image{'' if size == 1 else 's'}"
        what = f"{timer.calls} evaluations of {images} at a time"
        if size * image_seconds <= WHOLE_BATCH_SECONDS:
            image_seconds, batches = self._time_batches(index)
            what = f"{batches} batches of {images}"
        if size < spec.batch_size:
            what += f", in place of {spec.batch_size}"
        return SamplingPace(
            image_seconds, f"measured on {self._where()}, {what}; excludes encoding and upload"
        )

    def _fitting_size(self) -> int:
        """Images in a measured batch: the generation's; on a CPU as many as are quick."""
        spec = self._engine.spec
        if self._device.type == "cuda":
            return spec.batch_size
        one = self._time_calls(torch.tensor([spec.first_index]), 0.0)
        return max(1, min(spec.batch_size, int(BUDGET_SECONDS / 4 / (one.seconds / one.calls))))

    def _time_calls(self, index: Tensor, until: float) -> _CallTimer:
        """Sample `index` again and again until then, at least a few calls of the network."""
        timer = _CallTimer(self._device, until)
        hook = self._net.register_forward_hook(timer)
        try:
            with suppress(_EnoughError):
                while True:  # with a callback, so that no CUDA graph replaces the calls
                    self._engine.images(index, lambda step: None)
        finally:
            hook.remove()
        return timer

    def _time_batches(self, index: Tensor) -> tuple[float, int]:
        """Seconds per image of whole batches, launched ahead as a worker launches them; and how many."""
        if self._device.type == "cuda":
            for _ in range(_WARM_UP_BATCHES):
                self._engine.images(index)
        launched: deque[LaunchedImages] = deque()
        began, count = time.monotonic(), 0
        while count < _MIN_BATCHES or (time.monotonic() < self._deadline and count < _MAX_BATCHES):
            launched.append(self._engine.launch(index))
            count += 1
            if len(launched) > self._engine.ahead:
                launched.popleft().wait()
        for last in launched:
            last.wait()
        return (time.monotonic() - began) / (count * len(index)), count

    def _where(self) -> str:
        spec = self._engine.spec
        if self._device.type == "cuda":
            return f"this machine's {torch.cuda.get_device_name()}"
        return f"{spec.cpu_threads} thread{'' if spec.cpu_threads == 1 else 's'} of this CPU"
