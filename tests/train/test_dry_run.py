"""What a dry run of a training estimates: exact where it can be computed, and printed quickly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.jobs.cli import app
from ddpm_pipeline.jobs.runner import JobArguments, settings_of
from ddpm_pipeline.nets.flops import sample_flops
from ddpm_pipeline.train import dry_run, teacher
from ddpm_pipeline.train.dry_run import NotMeasuredError, Pace, estimate, measure_pace, probed_size
from ddpm_pipeline.train.loop import Trainer
from ddpm_pipeline.train.state import initial_state

CPU = torch.device("cpu")
_counted: dict[str, int] = {}


def operations(net: UNetConfig) -> int:
    """`sample_flops`, which takes a second, once for each network."""
    name = net.digest()
    if name not in _counted:
        _counted[name] = sample_flops(net)
    return _counted[name]


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A root of plain files, nothing in it; probes that do not wait for a quiet moment; networks counted once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_ROOT", f"file://{tmp_path}/root")
    monkeypatch.setattr(dry_run, "BUDGET_SECONDS", 0.3)
    monkeypatch.setattr(teacher, "sample_flops", operations)


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
    pace = dry_run.Pace(0.016, 0.0, 16, 8, 1, None)
    monkeypatch.setattr(dry_run, "measure_pace", lambda config, device, flops: pace)
    config = preset("digits", "workers.num_workers=1")
    assert estimate(config).mfu is None
    peak = 4000 * operations(config.net)  # of which a sample a millisecond is a quarter
    monkeypatch.setattr(dry_run, "device_peak_flops", lambda device, precision: float(peak))
    told = estimate(config)
    assert told.mfu == pytest.approx(0.25)
    assert "mfu         25.0% of the GPU's peak, in the measured steps" in told.lines()


def test_as_json_the_estimate_stands_beside_the_settings() -> None:
    result = CliRunner().invoke(app, ["train", "digits", "workers.num_workers=1", "--dry-run", "--json"])
    told = json.loads(result.stdout)["estimate"]
    config = preset("digits")
    assert told["flops_per_step"] == 128 * operations(config.net)
    assert told["memory_bytes"] == sum(told["memory_parts"].values())
    assert told["memory_parts"]["averages"] == told["memory_parts"]["weights"] == 4 * told["parameters"]
    assert told["duration_seconds"] > 0


def test_a_large_network_is_measured_on_smaller_images_that_its_levels_still_divide() -> None:
    for name, size in [("digits", 8), ("ddpm-cifar10", 32), ("ddpm-256", 64)]:
        config = preset(name, "precision=float32")
        assert probed_size(config, CPU, operations(config.net)) == size
        assert size % 2 ** (len(config.net.multipliers) - 1) == 0
    half = preset("digits", "net.image_size=64", "net.attention_resolutions=[32]", "net.base_channels=128")
    assert probed_size(half.model_copy(update={"precision": "bfloat16"}), CPU, operations(half.net)) < 64


def test_a_measure_on_smaller_images_is_scaled_up_by_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset("digits", "net.image_size=32", "net.attention_resolutions=[16]")
    quarter = preset("digits", "net.image_size=16", "net.attention_resolutions=[8]")
    flops = operations(config.net)
    monkeypatch.setattr(dry_run, "_pass", lambda trainer, batch: 1.0)
    whole = measure_pace(config, CPU, flops)
    monkeypatch.setattr(dry_run, "LARGEST_SAMPLE_FLOPS", flops / 3)
    small = measure_pace(config, CPU, flops)
    assert (whole.image_size, whole.sample_seconds) == (32, 1.0)
    assert small.image_size == 16
    assert small.sample_seconds == pytest.approx(flops / operations(quarter.net))


def test_a_state_that_does_not_fit_this_machine_is_said_and_not_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Little:
        available = 10_000_000

    monkeypatch.setattr("psutil.virtual_memory", lambda: Little)
    config = preset("digits", "workers.micro_batch=8")
    lines = estimate(config).lines()
    assert lines[-1] == (
        "duration    not measured: the state of a worker, 24.1 MB, does not fit this machine, where 6.0 MB may be used"
    )


def on_gpu(*words: str) -> TrainConfig:
    return preset("digits", "workers.num_workers=1", "workers.gpus_per_worker=1", *words)


def test_on_a_gpu_the_state_is_compared_with_the_devices_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "worker_memory_bytes", lambda *_: 20_000_000)
    with pytest.raises(
        NotMeasuredError, match=r"20\.1 MB, does not fit this machine's GPU, where 20\.0 MB may"
    ):
        measure_pace(on_gpu(), torch.device("cuda"), 1)


def test_a_lack_of_memory_is_one_line_that_names_a_smaller_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(dry_run, "find_gradients", full)
    lines = estimate(preset("digits", "workers.num_workers=1", "workers.micro_batch=8")).lines()
    assert lines[-1].startswith(
        "duration    not measured: train.workers.micro_batch: 8 samples at a time do not fit"
    )
    assert lines[-1].endswith(
        "set train.workers.micro_batch=4, which changes the weights in their last bits only"
    )
    assert "\n" not in lines[-1]


def test_on_a_gpu_a_step_is_made_of_whole_micro_batches_of_full_size_images() -> None:
    config = on_gpu("workers.micro_batch=48")  # of 128: three parts, of 43 samples at most
    state = initial_state(config, CPU)
    trainer = Trainer(config, NoiseSchedule.from_config(config.schedule), state.net, torch.device("cuda"), 1)
    assert dry_run._measured_samples(trainer, dry_run._batch(config, 1, 8)) == 43
    assert probed_size(config, torch.device("cuda"), 10**15) == config.net.image_size
    pace = Pace(0.5, 0.25, samples=43, image_size=8, threads=1, peak_bytes=1)
    assert pace.step_seconds(128) == 3 * 0.5 + 0.25
    on_cpu = replace(pace, samples=16, peak_bytes=None)
    assert on_cpu.step_seconds(128) == 8 * 0.5 + 0.25
    assert on_cpu.step_seconds(24) == 1.5 * 0.5 + 0.25


def test_on_a_gpu_the_cost_of_deterministic_algorithms_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU that is played: only the order of calls and the printed line are looked at."""
    modes: list[tuple[str, bool]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        dry_run, "set_up_arithmetic", lambda matmul, deterministic: modes.append((matmul, deterministic))
    )
    monkeypatch.setattr(
        dry_run,
        "measure_pace",
        lambda *_: Pace(
            1.2 if modes[-1][1] else 1.0, 0.0, samples=128, image_size=8, threads=1, peak_bytes=10**9
        ),
    )
    monkeypatch.setattr(dry_run, "device_peak_flops", lambda *_: None)
    found = estimate(on_gpu("matmul=tf32", "workers.micro_batch=128"))
    assert modes == [("tf32", True), ("tf32", False)]
    assert found.duration_seconds == pytest.approx(1.2 * found.steps)
    assert found.lines()[-1] == "arithmetic  1.2 s per step with deterministic=true, 1 s with false (+20%)"
    free = estimate(on_gpu("deterministic=false", "workers.micro_batch=128"))
    assert free.duration_seconds == pytest.approx(1.0 * free.steps)


def test_the_duration_says_that_it_is_without_compilation() -> None:
    note = estimate(preset("digits", "workers.num_workers=1", "compile=true")).duration_note
    assert ", without torch.compile; excludes" in note
