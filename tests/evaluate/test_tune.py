"""The sampler search: a table, a plot, and a preset that a generation takes."""

import io
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image
from pydantic import ValidationError

import ddpm_pipeline.jobs.tune
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.evaluation import TuneConfig
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.document import Metric
from ddpm_pipeline.evaluate.sampler_search import (
    Candidate,
    candidate_samplers,
    evaluations,
    front,
    recommended,
)
from ddpm_pipeline.generate.model_source import find_model
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.jobs.runner import JobArguments, settings_of
from ddpm_pipeline.progress import no_progress
from tests.generate.tiny import tiny_card, tiny_model


def config(model: Path, data: str, output: Path, **more: object) -> TuneConfig:
    settings = {
        "model": str(model),
        "evaluate": {"reference": data, "num_splits": 1},
        "kinds": ["ddim", "heun"],
        "steps": [2, 3],
        "count": 20,
        "output": str(output),
    }
    return TuneConfig.model_validate(settings | more)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model", tiny_card(size=8))


def candidate(kind: str, steps: int, distance: float) -> Candidate:
    sampler = SamplerConfig.model_validate({"kind": kind, "num_steps": steps})
    metric = Metric(value=distance, n=9, n_reference=9)
    return Candidate(
        sampler=sampler, evaluations=evaluations(sampler), seconds=1, metrics={"frechet": metric}
    )


TRIED = [
    candidate("ddim", 5, 4.0),
    candidate("ddim", 10, 2.04),
    candidate("heun", 5, 3.0),
    candidate("dpm++2m", 20, 2.0),
    candidate("ddim", 50, 2.1),
]


def test_the_cheapest_sampler_that_is_nearly_as_good_as_the_best_is_recommended(
    model: Path, tmp_path: Path
) -> None:
    assert recommended(TRIED, config(model, "d", tmp_path, tolerance=0.05)) is TRIED[1]
    assert recommended(TRIED, config(model, "d", tmp_path, tolerance=0.01)) is TRIED[3]


def test_a_best_metric_below_zero_is_recommended(model: Path, tmp_path: Path) -> None:
    below = [candidate("ddim", 5, 0.1), candidate("ddim", 10, -0.2)]
    assert recommended(below, config(model, "d", tmp_path)) is below[1]


def test_an_unknown_metric_is_refused_before_sampling(model: Path, tmp_path: Path) -> None:
    for name in ("fretchet", "class_accuracy"):  # higher is better in the second
        with pytest.raises(ValidationError, match="metric"):
            config(model, "d", tmp_path, metric=name)


def test_a_metric_that_needs_more_samples_is_named_after_the_first_sampler(
    digits: str, model: Path, tmp_path: Path
) -> None:
    settings = config(model, digits, tmp_path / "tuning", metric="frechet_ratio")
    heard: list[int] = []
    with pytest.raises(UserError, match=r"tune\.metric: .* no frechet_ratio"):
        ddpm_pipeline.jobs.tune.run(settings, lambda done, total, note="": heard.append(done))
    assert heard == []


def test_the_front_is_not_beaten_by_cheaper_samplers_and_heun_counts_twice() -> None:
    assert [evaluations(one.sampler) for one in TRIED] == [5, 10, 9, 20, 50]
    assert front(TRIED, "frechet") == [TRIED[0], TRIED[2], TRIED[1], TRIED[3]]
    assert evaluations(SamplerConfig(kind="ddim", num_steps=5, guidance_scale=2.0)) == 10


def test_guidance_is_refused_for_a_network_without_a_null_class(tmp_path: Path) -> None:
    plain = tiny_model(tmp_path / "plain", tiny_card(classes=False))
    settings = config(plain, "d", tmp_path, guidance=[1.0, 2.0])
    with pytest.raises(UserError, match=r"tune\.guidance"):
        candidate_samplers(settings, find_model(str(plain)))


def test_table_plot_and_preset_are_stored_and_a_generation_accepts_the_preset(
    digits: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ddpm_pipeline.jobs.tune.run(config(model, digits, tmp_path / "tuning"), no_progress) == 0
    folder = tmp_path / "tuning" / "local"
    tried = [Candidate.model_validate(one) for one in json.loads((folder / "samplers.json").read_text())]
    assert [(one.sampler.kind, one.evaluations) for one in tried] == [
        ("ddim", 2),
        ("ddim", 3),
        ("heun", 3),
        ("heun", 5),
    ]
    with Image.open(io.BytesIO((folder / "samplers.png").read_bytes())) as plot:
        assert plot.width > 400
    table = capsys.readouterr().out.splitlines()
    (best,) = [line for line in table if line.startswith(">")]
    preset = yaml.safe_load((folder / "preset.yaml").read_text())["generate"]["sampler"]
    assert best[3:].split()[:2] == [preset.get("kind", SamplerConfig().kind), str(preset["num_steps"])]
    call = JobArguments(
        files=(folder / "preset.yaml",), overrides=(f"model={model}", "count=10", f"output={tmp_path}/out")
    )
    chosen = settings_of(GenerateConfig, "generate", call).sampler
    assert chosen in [one.sampler for one in tried]


@pytest.mark.stack
@pytest.mark.long
def test_the_cluster_gives_the_metrics_of_this_process(
    digits: str, model: Path, tmp_path: Path, stack: LocalStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found: list[list[Candidate]] = []
    for workers in (0, 2):
        settings = config(model, digits, tmp_path / str(workers), num_workers=workers, kinds=["ddim"])
        assert ddpm_pipeline.jobs.tune.run(settings, no_progress) == 0
        tried = json.loads((tmp_path / str(workers) / "local" / "samplers.json").read_text())
        found.append([Candidate.model_validate(one) for one in tried])
    in_process, on_cluster = found
    assert [one.sampler for one in in_process] == [one.sampler for one in on_cluster]
    for one, other in zip(in_process, on_cluster, strict=True):
        values = {name: metric.value for name, metric in one.metrics.items()}
        # Not to the bit: a worker's linear algebra may use another number of threads.
        assert {name: metric.value for name, metric in other.metrics.items()} == pytest.approx(
            values, rel=1e-6, abs=1e-6
        )
