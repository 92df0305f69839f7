"""Presets whose trainings take days or GPUs run at their true size: a few steps, two images, verified.

Images are synthetic. Peak memory and time of each training and generation are told at the end of the session.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.jobs.runner import PROGRAM
from tests.chronicle import PROPERTY

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(3000)]
STEPS = 3
BATCH = 2
TRAINING = (
    f"steps={STEPS}",
    f"global_batch={BATCH}",
    "precision=float32",  # most CPUs emulate bfloat16
    "optimizer.warmup_steps=1",
    "data.num_workers=0",
    "workers.num_workers=1",
    "workers.gpus_per_worker=0",
    "workers.cpus_per_worker=1",
    f"log_every_steps={STEPS}",
    f"checkpoint.every_steps={STEPS}",
    "checkpoint.eval_samples=4",
    f"grid.every_steps={STEPS}",
    "grid.count=1",
    "grid.sampler.num_steps=1",
)
GENERATION = (
    "count=2",
    "shard_size=2",
    "batch_size=2",
    "sampler.num_steps=2",
    "num_workers=1",
    "gpus_per_worker=0",
)


@dataclass
class Cost:
    """Of one command."""

    seconds: float
    peak_bytes: int


def run(*words: str) -> Cost:
    """Run a command, which must succeed, in a process of its own."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    said = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said
    return Cost(time.monotonic() - began, usage.ru_maxrss * 1024)


def synthetic(folder: Path, size: int, channels: int) -> Path:
    """Eight images of noise in two class folders."""
    generator = np.random.default_rng(0)
    for number in range(8):
        file = folder / str(number % 2) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (size, size, channels), np.uint8)
        Image.fromarray(pixels.squeeze()).save(file)
    return folder


@pytest.mark.parametrize(
    ("preset", "size", "channels"),
    [
        ("mnist-28", 28, 1),
        ("ddpm-cifar10", 32, 3),
        ("emoji-32", 32, 3),
        ("improved-64-cond", 64, 3),
        ("ddpm-256", 256, 3),
    ],
)
def test_a_preset_trains_and_generates_at_its_true_size(
    stack: LocalStack,
    prefix: str,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    preset: str,
    size: int,
    channels: int,
) -> None:
    data, runs, samples = (f"{prefix}/{name}" for name in ("data", "runs", "samples"))
    name = f"{preset}-{tmp_path.name.rpartition('-')[2]}"
    run("pack", preset, f"source={synthetic(tmp_path / 'images', size, channels)}", f"dest={data}")
    training = run("train", preset, "--local", f"name={name}", f"data.uri={data}", f"runs={runs}", *TRAINING)
    generation = run("generate", preset, f"model={name}@champion", f"output={samples}", *GENERATION)
    run("verify", samples)
    record_property(
        PROPERTY,
        [
            f"{preset}: {STEPS} steps of {BATCH} images took {training.seconds:.0f} s and "
            f"{training.peak_bytes / 2**30:.1f} GiB; two images of two sampler steps took {generation.seconds:.0f} s"
        ],
    )
