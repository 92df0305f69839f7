"""What one training step, or one step of a sampler, asks of a CUDA device: `python -m tests.cuda.counts NAME...`

Prints JSON: for each name the counts of a step, and the lines that wait; null for the steps not named. Networks are
those of the presets with few channels and small images, which change no count but one: group norms of maps above 16x16
take one kernel more each way, and with small images there are fewer of these.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.load import ROOT_VARIABLE
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.jobs.runner import JobArguments, settings_of
from tests.cuda.simulated_device import Counts, counts, simulated_device

import torch  # isort: skip

from ddpm_pipeline.data.reading.loader import Batch
from ddpm_pipeline.diffusion import NoiseSchedule, sample
from ddpm_pipeline.generate.engine import _LowPrecision
from ddpm_pipeline.nets.build import seeded_init
from ddpm_pipeline.train.loop import Trainer
from ddpm_pipeline.train.state import initial_state
from ddpm_pipeline.train.step_metrics import StepMetrics

SMALL = {
    "digits": ["train.net.base_channels=8"],
    "ddpm-cifar10": ["train.net.base_channels=8"],
    "ddpm-256": [
        "train.net.base_channels=8",
        "train.net.image_size=64",
        "train.net.attention_resolutions=[4]",
    ],
    "improved-64-cond": ["train.net.base_channels=8"],
}
BATCH = 2
WARM, COUNTED = 2, 1
"""Steps before counting, and counted ones: the first steps make the optimiser's state."""


def settings(preset: str, *overrides: str) -> TrainConfig:
    """The settings of a preset's training on one GPU, its network made small."""
    words = [word.removeprefix("train.") for word in (*SMALL[preset], *overrides)]
    os.environ.setdefault(ROOT_VARIABLE, "file:///absent")
    small = (
        "net.norm_groups=4",
        f"global_batch={BATCH}",
        "workers.num_workers=1",
        "workers.gpus_per_worker=1",
    )
    return settings_of(TrainConfig, "train", JobArguments(preset, overrides=(*words, *small)))


def training_step(preset: str, *overrides: str) -> dict[str, Any]:
    """The counts of one optimiser step."""
    config = settings(preset, *overrides)
    device = torch.device("cuda")
    with simulated_device():
        state = initial_state(config, device)
        schedule = NoiseSchedule.from_config(config.schedule).to(device)
        trainer = Trainer(config, schedule, state.net, device, world=1)
        window = StepMetrics(trainer.schedule.T, device)
        steps = trainer.steps(state, batches(config), window)
        for _ in range(WARM):
            next(steps)
        counts.reset()
        for _ in range(COUNTED):
            next(steps)
        return _per_step(counts, COUNTED)


def batches(config: TrainConfig) -> Iterator[Batch]:
    """Batches of black images, as the loader gives them."""
    net = config.net
    for step in range(WARM + COUNTED):
        yield Batch(
            step,
            torch.arange(step * BATCH, (step + 1) * BATCH),
            torch.zeros(BATCH, net.in_channels, net.image_size, net.image_size, dtype=torch.uint8),
            torch.zeros(BATCH, dtype=torch.int64) if net.num_classes else None,
            wait_seconds=0.0,
        )


def sampler_step(preset: str, dtype: str, kind: str) -> dict[str, Any]:
    """The counts of one step in the middle of a sampling without guidance."""
    config = settings(preset)
    shape = (config.net.in_channels, config.net.image_size, config.net.image_size)
    with simulated_device(), torch.inference_mode():
        net = seeded_init(config.net, 0).to("cuda").eval().requires_grad_(False)
        net.to(memory_format=torch.channels_last)
        if dtype != "float32":
            net = _LowPrecision(net, _Precision(dtype))
        index = torch.arange(BATCH, device="cuda")
        labels = torch.zeros_like(index) if config.net.num_classes else None
        seen: list[int] = []

        def on_step(step: Any) -> None:
            seen.append(step.k)
            if len(seen) == WARM:
                counts.reset()
            if len(seen) == WARM + COUNTED:
                found.update(_per_step(counts, COUNTED))

        found: dict[str, Any] = {}
        sampler = SamplerConfig(kind=kind, num_steps=WARM + COUNTED + 1)
        sample(
            net,
            NoiseSchedule.from_config(config.schedule),
            sampler,
            index,
            shape,
            seed=0,
            class_labels=labels,
            objective=config.objective,
            on_step=on_step,
        )
        return found


class _Precision:
    """What `_LowPrecision` reads of a spec."""

    device = "cuda"

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


def _per_step(found: Counts, steps: int) -> dict[str, Any]:
    def per_step(number: int) -> float:
        return number / steps

    return {
        "kernels": per_step(found.kernels.total()),
        "casts": per_step(found.kernels["cast or copy"]),
        "layout_copies": per_step(found.kernels["layout copy"]),
        "host_waits": per_step(found.waits.total()),
        "copies": {name: per_step(n) for name, n in sorted(found.copies.items())},
        "kernels_by_file": {name: per_step(n) for name, n in found.kernel_files.most_common()},
        "waits": {name: per_step(n) for name, n in found.waits.most_common()},
    }


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "training step, digits": partial(training_step, "digits"),
    "training step, ddpm-cifar10, float32": partial(training_step, "ddpm-cifar10"),
    "training step, ddpm-cifar10, bfloat16": partial(training_step, "ddpm-cifar10", "precision=bfloat16"),
    "training step, ddpm-256, bfloat16": partial(training_step, "ddpm-256"),
    "training step, improved-64-cond, bfloat16": partial(training_step, "improved-64-cond"),
    **{
        f"sampler step, {preset}, {dtype}, {kind}": partial(sampler_step, preset, dtype, kind)
        for preset in ("digits", "ddpm-cifar10")
        for dtype in ("float32", "bfloat16")
        for kind in ("ancestral", "dpm++2m")
    },
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    names = sys.argv[1:]
    print(json.dumps({name: step() if name in names else None for name, step in SCENARIOS.items()}, indent=2))
