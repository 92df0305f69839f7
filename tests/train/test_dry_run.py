"""What a dry run of a training estimates: exact where it can be computed, and printed quickly."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from jobs.cli import app
from jobs.runner import JobArguments, settings_of
from pipeline.config.training import TrainConfig
from pipeline.nets.flops import sample_flops
from pipeline.train import dry_run
from pipeline.train.dry_run import estimate, measure_pace, probed_size

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A root of plain files, nothing in it; probes that do not wait for a quiet moment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_ROOT", f"file://{tmp_path}/root")
    monkeypatch.setattr(dry_run, "BUDGET_SECONDS", 0.3)


def preset(name: str, *words: str) -> TrainConfig:
    return settings_of(TrainConfig, "train", JobArguments.of([name, *words]))


def test_a_dry_run_tells_what_the_training_needs_without_data_or_services() -> None:
    result = CliRunner().invoke(app, ["train", "digits", "--dry-run"])
    assert result.exit_code == 0
    told = dict(line[2:].split(maxsplit=1) for line in result.stdout.splitlines() if line.startswith("# "))
    assert list(told) == ["parameters", "operations", "memory", "micro-batch", "steps", "duration"]
    assert told["parameters"] == "1,003,137"
    assert "activations of 64" in told["memory"]
    assert told["steps"] == "1,500"
    assert "s per step, measured on 1 thread of this CPU, assuming 2 workers" in told["duration"]
    assert yaml.safe_load(result.stdout)["train"]["name"] == "digits"


def test_mfu_of_the_measured_steps_is_told_where_the_peak_of_the_device_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pace = dry_run.Pace(0.001, 0.0, 16, 8, 1, None)
    monkeypatch.setattr(dry_run, "measure_pace", lambda config, device, flops: pace)
    config = preset("digits", "workers.num_workers=1")
    assert estimate(config).mfu is None
    peak = 4000 * sample_flops(config.net)  # of which a sample a millisecond is a quarter
    monkeypatch.setattr(dry_run, "device_peak_flops", lambda device, precision: float(peak))
    told = estimate(config)
    assert told.mfu == pytest.approx(0.25)
    assert "mfu         25.0% of the GPU's peak, in the measured steps" in told.lines()


def test_as_json_the_estimate_stands_beside_the_settings() -> None:
    result = CliRunner().invoke(app, ["train", "digits", "workers.num_workers=1", "--dry-run", "--json"])
    told = json.loads(result.stdout)["estimate"]
    config = preset("digits")
    assert told["flops_per_step"] == 128 * sample_flops(config.net)
    assert told["memory_bytes"] == sum(told["memory_parts"].values())
    assert told["memory_parts"]["averages"] == told["memory_parts"]["weights"] == 4 * told["parameters"]
    assert told["duration_seconds"] > 0


def test_a_large_network_is_measured_on_smaller_images_that_its_levels_still_divide() -> None:
    for name, size in [("digits", 8), ("ddpm-cifar10", 32), ("ddpm-256", 64)]:
        config = preset(name, "precision=float32")
        assert probed_size(config, CPU, sample_flops(config.net)) == size
        assert size % 2 ** (len(config.net.multipliers) - 1) == 0
    half = preset("digits", "net.image_size=64", "net.attention_resolutions=[32]", "net.base_channels=128")
    assert probed_size(half.model_copy(update={"precision": "bfloat16"}), CPU, sample_flops(half.net)) < 64


def test_a_measure_on_smaller_images_is_scaled_up_by_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset("digits", "net.image_size=32", "net.attention_resolutions=[16]")
    flops = sample_flops(config.net)
    whole = measure_pace(config, CPU, flops)
    monkeypatch.setattr(dry_run, "LARGEST_SAMPLE_FLOPS", flops / 3)
    small = measure_pace(config, CPU, flops)
    assert whole is not None
    assert small is not None
    assert (whole.image_size, small.image_size) == (32, 16)
    # the machine is shared: an answer of the right size, not more
    assert 0.1 < small.sample_seconds / whole.sample_seconds < 10


def test_a_state_that_does_not_fit_this_machine_is_said_and_not_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Little:
        available = 10_000_000

    monkeypatch.setattr("psutil.virtual_memory", lambda: Little)
    config = preset("digits", "workers.micro_batch=8")
    lines = estimate(config).lines()
    assert lines[-1] == "duration    not measured: the state of a worker, 24.1 MB, does not fit this machine"
