"""The library: the same work as the commands', quietly, with objects for settings and results."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ddpm_pipeline
from ddpm_pipeline import api
from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.packing.known_datasets import KNOWN_DATASETS
from ddpm_pipeline.jobs.runner import JobArguments, given_settings, settings_of
from tests.docs.lines import REPOSITORY, fences
from tests.generate.tiny import fill, settings, tiny_card, tiny_model

HEAVY = {"torch", "ray", "mlflow", "numpy", "boto3", "matplotlib", "sklearn", "webdataset"}


def imported_by(statement: str) -> set[str]:
    """The modules that a fresh Python has imported after a statement, over those it starts with."""
    listed = "print(json.dumps([*(sys.modules.keys() - before)]))"
    code = f"import json, sys, typing\nbefore = set(sys.modules)\n{statement}\n{listed}"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_the_package_imports_one_module() -> None:
    assert imported_by("import ddpm_pipeline") == {"ddpm_pipeline"}


def test_importing_the_library_imports_nothing_that_computes_or_talks_to_servers() -> None:
    modules = {name.partition(".")[0] for name in imported_by("from ddpm_pipeline import api")}
    assert "pydantic" in modules
    assert modules & HEAVY == set()


def test_the_library_is_an_attribute_of_the_package_and_nothing_else_is_invented() -> None:
    assert ddpm_pipeline.api is api
    with pytest.raises(AttributeError, match="no attribute 'apy'"):
        _ = ddpm_pipeline.apy  # pyright: ignore


def test_every_public_name_exists_and_has_its_place_in_the_documentation() -> None:
    page = (REPOSITORY / "docs/api.md").read_text()
    assert sorted(api.__all__) == api.__all__
    for name in api.__all__:
        assert hasattr(api, name)
        assert f"`{name}" in page, name


SAMPLER = SamplerConfig(kind="ddim", num_steps=3)


@pytest.mark.parametrize(
    ("classes", "asked", "expected"),
    [
        (True, "auto", {0, 1, 2}),
        (True, {"two": 1.0, 0: 2.0}, {0, 2}),
        (True, [2], {2}),
        (False, "auto", {None}),
    ],
)
def test_a_models_samples_are_bit_for_bit_those_of_a_generation(
    tmp_path: Path, classes: bool, asked: Any, expected: set[int | None]
) -> None:
    folder = tiny_model(tmp_path / "model", tiny_card(classes))
    uri = f"file://{tmp_path}/out"
    fill(settings(folder, uri, count=23, seed=5, first_index=7, classes=asked))
    generation = api.open_generation(uri)
    images, labels, indexes = zip(*generation, strict=True)
    assert indexes == tuple(range(7, 30))
    assert len(generation) == len(images) == 23
    model = api.load_model(folder, device="cpu")
    alike: dict[str, Any] = {
        "seed": 5,
        "sampler": SAMPLER,
        "classes": asked,
        "first_index": 7,
        "batch_size": 4,
        "shard_size": 10,
    }
    drawn = model.sample(23, **alike)
    assert (drawn.dtype, drawn.shape) == (np.uint8, (23, 4, 4, 1))
    np.testing.assert_array_equal(drawn, np.stack(images))
    np.testing.assert_array_equal(model.sample(2, **alike), np.stack(images[:2]))  # part of a batch
    assert drawn.std() > 0
    assert not np.array_equal(model.sample(23, **{**alike, "seed": 6}), drawn)
    assert set(labels) == expected


def test_a_model_names_what_it_is_and_keeps_torch_as_it_was(tmp_path: Path) -> None:
    import torch

    folder = tiny_model(tmp_path / "model")
    model = api.load_model(str(folder), device="cpu")
    assert model.class_names == ("nought", "one", "two")
    assert model.reference == str(folder)
    torch.set_num_threads(2)
    seen: list[tuple[int, int]] = []
    model.sample(
        5,
        sampler={"kind": "ddim", "num_steps": 2},
        batch_size=4,
        progress=lambda d, t, note="": seen.append((d, t)),
    )
    assert torch.get_num_threads() == 2
    assert seen == [(4, 5), (5, 5)]


def test_what_a_model_cannot_do_is_refused_in_a_line(tmp_path: Path) -> None:
    model = api.load_model(tiny_model(tmp_path / "model"), device="cpu")
    with pytest.raises(api.UserError, match="classes: 'nine' is unknown"):
        model.sample(1, classes=["nine"], sampler=SAMPLER)
    with pytest.raises(api.UserError, match=r"sampler\.num_steps"):
        model.sample(1, sampler={"num_steps": 0})
    with pytest.raises(api.UserError, match="batch_size is larger than shard_size"):
        model.sample(1, batch_size=10, shard_size=5)
    with pytest.raises(api.UserError, match="is not a folder with"):
        api.load_model("nowhere")


def test_an_incomplete_generation_cannot_be_iterated_and_a_damaged_one_says_where(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/out"
    with pytest.raises(api.UserError, match=r"no spec\.json found"):
        api.open_generation(uri)
    fill(settings(tiny_model(tmp_path / "model"), uri, count=20))
    images = iter(api.open_generation(uri))
    shard = tmp_path / "out/shards/000001.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    assert [next(images)[2] for _ in range(10)] == list(range(10))
    with pytest.raises(api.DamageError, match=r"shards/000001\.tar: has not the sha256 of the manifest"):
        next(images)
    (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(api.UserError, match="is not complete"):
        api.open_generation(uri)


def test_a_job_prints_nothing_and_reports_its_progress(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    seen: list[int] = []
    report = api.pack(
        source="digits",
        dest=f"file://{tmp_path}/digits",
        channels=1,
        progress=lambda done, total, note="": seen.append(done),
    )
    assert report.num_samples == 1797
    assert seen[-1] == 1797
    again = api.pack(PackConfig(source="digits", dest=f"file://{tmp_path}/digits", channels=1))
    assert again.already_complete
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_verify_gives_the_report(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    fill(settings(model, f"file://{tmp_path}/out", count=12))
    report = api.verify(f"file://{tmp_path}/out", regenerate=3, model=str(model))
    assert report.ok
    assert (report.samples_checked, report.regenerated) == (12, 3)


def test_settings_are_a_preset_a_file_or_an_object_and_keywords_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDPM_ROOT", "s3://here")
    values = {"steps": 500, "optimizer": {"lr": 1e-3}, "ema.decay": 0.5, "runs": "{root}/mine"}
    train = given_settings(TrainConfig, "train", "digits", values)
    assert (train.steps, train.optimizer.lr, train.ema.decay, train.net.image_size) == (500, 1e-3, 0.5, 8)
    assert (train.runs, train.optimizer.warmup_steps) == ("s3://here/mine", 100)
    again = given_settings(TrainConfig, "train", train, {"seed": 3})
    assert again == train.model_copy(update={"seed": 3})
    assert given_settings(TrainConfig, "train", train, {}) is train
    file = tmp_path / "mine.yaml"
    file.write_text("base: digits\ngenerate:\n  count: 7\n")
    generate = given_settings(GenerateConfig, "generate", file, {"sampler": SAMPLER, "output": tmp_path})
    assert (generate.count, generate.sampler, generate.output) == (7, SAMPLER, str(tmp_path))


@pytest.mark.parametrize(
    ("given", "values", "said"),
    [
        ("digits", {"stesp": 5}, "train.stesp: unknown setting; did you mean 'steps'?"),
        ("digist", {}, "preset 'digist': unknown"),
        ("digits", {"steps": "many"}, "train.steps"),
        (None, {}, "train.name: required|train.data: required"),
    ],
)
def test_a_wrong_setting_is_an_exception_that_names_it(
    given: str | None, values: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDPM_ROOT", "s3://here")
    with pytest.raises(api.UserError, match=said):
        api.train(given, **values)


def test_the_calls_of_the_documentation_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddpm_pipeline.jobs import pack, train

    monkeypatch.setenv("DDPM_ROOT", "s3://here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos.yaml").write_text("base: digits\ntrain: {name: photos}\n")
    asked: list[Any] = []
    monkeypatch.setattr(train, "train", lambda config, *_: asked.append(config))
    monkeypatch.setattr(pack, "pack_on_cluster", lambda config, *_: asked.append(config))
    for example in fences(REPOSITORY / "docs/api.md", "python")[1:]:
        exec(example, {})
    first, second, third, packed = asked
    assert first == second
    assert (first.steps, first.optimizer.lr) == (500, 1e-4)
    assert (third.name, third.steps) == ("photos", 500)
    assert (packed.image_size, packed.dest, packed.channels) == (16, "file:///tmp/digits-16", 1)


def test_a_data_set_is_packed_by_its_name_as_the_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_pipeline.jobs import pack

    monkeypatch.setenv("DDPM_ROOT", "s3://here")
    asked: list[PackConfig] = []
    monkeypatch.setattr(pack, "pack_on_cluster", lambda config, *_: asked.append(config))
    for name in KNOWN_DATASETS:
        api.pack(name, shard_size=7)
        call = pack.with_dataset(JobArguments(preset=name, overrides=("shard_size=7",)))
        assert asked.pop() == settings_of(PackConfig, "pack", call)
