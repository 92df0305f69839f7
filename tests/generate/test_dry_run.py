"""What `ddpm generate --dry-run` foretells: exact evaluations, and device time and price from a short measurement."""

import json
import time
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate import dry_run
from ddpm_pipeline.generate.dry_run import GenerationEstimate, SamplingPace, estimate, measure_pace
from ddpm_pipeline.generate.engine import Engine
from ddpm_pipeline.jobs.cli import app
from ddpm_pipeline.store import open_store
from tests.generate.tiny import fill, plan_of, settings, tiny_card, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "BUDGET_SECONDS", 0.2)


def foretold(monkeypatch: pytest.MonkeyPatch, image_seconds: float = 0.02) -> None:
    pace = SamplingPace(image_seconds, "measured on nothing")
    monkeypatch.setattr(dry_run, "measure_pace", lambda *_: pace)  # pyright: ignore[reportUnknownLambdaType]


def clock(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets time pass by `seconds` for each evaluation of an image, and by nothing else."""
    now = 0.0

    def counted(self: torch.nn.Module, args: tuple[torch.Tensor, ...], output: object) -> None:
        nonlocal now
        now += seconds * len(args[0])

    build = dry_run.build_model

    def built(*args: object, **more: object) -> torch.nn.Module:
        net = build(*args, **more)  # type: ignore[arg-type]
        net.register_forward_hook(counted)
        return net

    monkeypatch.setattr(dry_run, "build_model", built)
    monkeypatch.setattr(time, "monotonic", lambda: now)


def test_device_time_and_price_follow_from_the_pace_of_one_device(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foretold(monkeypatch)
    config = settings(
        model, "out", count=5000, num_workers=4, cost={"per_device_hour": 1.8, "currency": "EUR"}
    )
    found = estimate(config)
    assert (found.images, found.evaluations_per_image) == (5000, 3)
    assert (found.device_seconds_per_1000, found.device_seconds, found.duration_seconds) == (20, 100, 25)
    assert found.money_per_1000 == pytest.approx(0.01)
    assert found.money == pytest.approx(0.05)
    assert found.lines() == [
        f"model       {model}",
        "evaluations 3 of the network per image",
        "device time 20 s per 1,000 images, 100 s for 5,000: measured on nothing",
        "price       0.01 EUR per 1,000 images, 0.05 EUR for 5,000",
        "duration    25 s with the workers of the settings, each as fast as one here",
    ]


def test_long_times_are_told_in_hours(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foretold(monkeypatch, image_seconds=36.0)
    (line,) = [
        line for line in estimate(settings(model, "out", count=500)).lines() if line.startswith("device")
    ]
    assert line == "device time 10 hours per 1,000 images, 5 hours for 500: measured on nothing"


def test_workers_that_share_a_gpu_are_one_device(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foretold(monkeypatch)
    found = estimate(settings(model, "out", count=1000, num_workers=4, gpus_per_worker=0.5))
    assert (found.device_seconds, found.duration_seconds) == (20, 10)


def test_without_a_price_there_is_none(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foretold(monkeypatch)
    found = estimate(settings(model, "out"))
    assert (found.money_per_1000, found.money) == (None, None)
    assert not any(line.startswith("price") for line in found.lines())


def test_the_network_is_run_at_the_batch_size_of_the_generation(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    launch = Engine.launch

    def watched(self: Engine, index: torch.Tensor, *rest: object) -> object:
        sizes.append(len(index))
        return launch(self, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "launch", watched)
    clock(0.001, monkeypatch)
    threads = torch.get_num_threads()
    spec, found = plan_of(settings(model, "out", batch_size=7))
    pace = measure_pace(settings(model, "out", batch_size=7), found, spec, 3)
    assert set(sizes) == {1, 7}
    assert pace.image_seconds == pytest.approx(0.003)
    assert "batches of 7 images; excludes encoding" in pace.note
    assert "1 thread of this CPU" in pace.note
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "sampler",
    [
        SamplerConfig(kind="ddim", num_steps=1),
        SamplerConfig(kind="heun", num_steps=5, spacing="leading", guidance_scale=2.0),
        SamplerConfig(num_steps=50),
    ],
)
def test_the_time_of_evaluations_adds_up_to_that_of_whole_batches(
    sampler: SamplerConfig, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(1.0, monkeypatch)
    config = settings(model, "out", sampler=sampler)
    spec, found = plan_of(config)
    evaluations = estimate(config).evaluations_per_image
    assert evaluations is not None
    for longest, what in ((0.0, "evaluations of"), (1e9, "batches of")):
        monkeypatch.setattr(dry_run, "WHOLE_BATCH_SECONDS", longest)
        pace = measure_pace(config, found, spec, evaluations)
        assert pace.image_seconds == pytest.approx(evaluations)
        assert what in pace.note


def test_a_batch_that_would_take_long_is_cut(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(0.02, monkeypatch)
    config = settings(model, "out", batch_size=9)
    spec, found = plan_of(config)
    assert "of 2 images, in place of 9" in measure_pace(config, found, spec, 3).note


def test_a_dry_run_writes_nothing_and_its_settings_can_be_given_back(model: Path, tmp_path: Path) -> None:
    output = f"file://{tmp_path}/out"
    words = [
        "generate",
        f"model={model}",
        f"output={output}",
        "count=50",
        "sampler.num_steps=4",
        "track=null",
    ]
    words += ["sampler.kind=ddim", "cost.per_device_hour=2"]
    first = CliRunner().invoke(app, [*words, "--dry-run"])
    assert first.exit_code == 0, first.output
    assert "# evaluations 4 of the network per image" in first.stdout
    assert " USD per 1,000 images, " in first.stdout
    (tmp_path / "again.yaml").write_text(first.stdout)
    again = CliRunner().invoke(app, ["generate", "-c", str(tmp_path / "again.yaml"), "--dry-run", "--json"])
    document = json.loads(again.stdout)
    assert document["generate"] == yaml.safe_load(first.stdout)["generate"]
    assert document["estimate"]["device_seconds"] > 0
    assert list(open_store(output).list()) == []


@pytest.mark.parametrize(
    ("other", "changes", "said"),
    [
        ("tiny@champion", {}, "MLFLOW_TRACKING_URI is not set"),
        ("/nowhere", {}, "/nowhere is not a folder"),
        (
            None,
            {"gpus_per_worker": 1},
            "the generation samples on GPUs (gpus_per_worker), and there is none here",
        ),
    ],
)
def test_without_model_or_device_the_evaluations_are_told_all_the_same(
    other: str | None, changes: dict[str, object], said: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = estimate(settings(Path(other or model), "out", **changes))
    assert (found.evaluations_per_image, found.device_seconds, found.money) == (3, None, None)
    assert f"device time not measured: {found.note}" in found.lines()
    assert said in found.note


def test_a_server_that_is_down_is_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("DDPM_START_WAIT_SECONDS", "3600")
    assert "127.0.0.1:9" in estimate(settings(Path("tiny@champion"), "out")).note


def test_evaluations_that_depend_on_an_unknown_schedule_are_not_guessed(model: Path) -> None:
    sampler = SamplerConfig(kind="ddim", num_steps=3, guidance_scale=2.0, guidance_interval=(0.1, 1.0))
    lost = estimate(settings(Path("/nowhere"), "out", sampler=sampler))
    assert lost.evaluations_per_image is None
    assert "evaluations not known" in lost.lines()
    known = estimate(settings(model, "out", sampler=sampler)).evaluations_per_image
    assert known is not None
    assert 3 <= known <= 6


def test_a_network_too_large_for_this_cpu_is_not_run(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "LARGEST_IMAGE_FLOPS", 1e3)
    monkeypatch.setattr(dry_run, "build_model", None)
    assert "too many for a dry run on this CPU" in estimate(settings(model, "out")).note


def test_settings_that_do_not_suit_the_model_are_refused(tmp_path: Path) -> None:
    without = tiny_model(tmp_path / "model", tiny_card(classes=False))
    with pytest.raises(UserError, match="the network has no classes"):
        estimate(settings(without, "out", classes=[1]))


def test_a_dry_run_and_the_generation_count_the_same_evaluations(model: Path, tmp_path: Path) -> None:
    config = settings(model, f"file://{tmp_path}/out", count=10)
    fill(config)
    stated = json.loads(open_store(config.output).read("manifest.json"))["evaluations_per_image"]
    found: GenerationEstimate = estimate(config)
    assert found.evaluations_per_image == stated
