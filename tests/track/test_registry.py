"""A version is registered once, found by what people write, and refused when its bytes are not its own."""

import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from ddpm_pipeline import __version__
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.diffusion.image_scaling import to_uint8
from ddpm_pipeline.diffusion.samplers import sample
from ddpm_pipeline.diffusion.schedule import NoiseSchedule
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.nets.model_files import load_model
from ddpm_pipeline.tracking import (
    MeasuredOn,
    Run,
    download,
    link_model,
    log_model_metrics,
    open_run,
    protected_model_sources,
    register,
    resolve,
    set_alias,
    tell_model_metrics,
    tracking_client,
    versions,
)
from ddpm_pipeline.tracking.registry import file_sha256
from tests.effort import long
from tests.relay import Relay
from tests.track.exported_model import exported

if TYPE_CHECKING:
    from mlflow import MlflowClient

pytestmark = pytest.mark.stack
NewRun = Callable[..., Run]


@pytest.fixture
def name() -> str:
    """A registered model's name of this test alone."""
    return f"m-{uuid.uuid4().hex[:12]}"


def test_what_was_registered_comes_back_byte_for_byte(
    server: str, name: str, new_run: NewRun, tmp_path: Path
) -> None:
    run, source = new_run(), exported(tmp_path / "export")
    version = register(name, source, run.run_id, {"step": "12000"}, "the first", uri=server)
    assert (version.name, version.version, version.run_id) == (name, 1, run.run_id)
    assert version.sha256 == version.tags["sha256"] == file_sha256(source / "model.safetensors")
    assert version.tags["step"] == "12000"
    assert version.description == "the first"
    folder = download(version, tmp_path / "download", uri=server)
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.safetensors"]
    for file in folder.iterdir():
        assert file.read_bytes() == (source / file.name).read_bytes()


def test_the_same_weights_of_the_same_run_are_one_version(
    server: str, client: "MlflowClient", name: str, new_run: NewRun, tmp_path: Path
) -> None:
    run, source = new_run(), exported(tmp_path / "a")
    first = register(name, source, run.run_id, {}, logged_name="unet-ema-0012000", uri=server)
    assert register(name, source, run.run_id, {}, logged_name="unet-ema-0012000", uri=server) == first
    second = register(name, exported(tmp_path / "b", seed=1), run.run_id, {}, uri=server)
    third = register(name, source, new_run("another").run_id, {}, uri=server)
    assert [v.version for v in versions(name, uri=server)] == [1, 2, 3]
    assert (second.version, third.version) == (2, 3)
    logged = client.search_logged_models([run.experiment_id], filter_string=f"source_run_id = '{run.run_id}'")
    assert sorted(model.name for model in logged) == sorted(["unet-ema-0012000", name])
    shown = [output.model_id for output in client.get_run(run.run_id).outputs.model_outputs]
    assert sorted(shown) == sorted(model.model_id for model in logged), (
        "each once, and so the run page lists them"
    )


def test_a_crash_between_upload_and_registration_uploads_nothing_twice(
    server: str, client: "MlflowClient", name: str, new_run: NewRun, tmp_path: Path
) -> None:
    run, source = new_run(), exported(tmp_path / "a")
    version = register(name, source, run.run_id, {}, uri=server)
    client.delete_model_version(name, str(version.version))
    again = register(name, source, run.run_id, {}, uri=server)
    assert again.version == 2
    assert again.model_id == version.model_id


@pytest.mark.parametrize("mode", [long("refuse"), "deaf"])
def test_a_registration_outlasts_an_outage_and_makes_one_version(
    mode: str, relay: Relay, server: str, name: str, new_run: NewRun, tmp_path: Path
) -> None:
    run, source = new_run(), exported(tmp_path / "a")
    relay.switch(mode)  # type: ignore[arg-type]
    back = threading.Timer(1.5, relay.switch, ["open"])
    back.start()
    version = register(name, source, run.run_id, {}, uri=relay.uri)
    back.join()
    assert [v.version for v in versions(name, uri=server)] == [version.version] == [1]


def test_a_reference_may_be_an_alias_a_number_or_mlflows_own_spelling(
    server: str, name: str, new_run: NewRun, tmp_path: Path
) -> None:
    run = new_run()
    register(name, exported(tmp_path / "a"), run.run_id, {}, uri=server)
    register(name, exported(tmp_path / "b", seed=1), run.run_id, {}, uri=server)
    set_alias(name, "champion", 2, uri=server)
    for reference in (f"{name}@champion", f"{name}/2", f"models:/{name}@champion", f"models:/{name}/2"):
        found = resolve(reference, uri=server)
        assert (found.version, found.aliases) == (2, ("champion",))
        assert resolve(found.reference, uri=server) == found
    set_alias(name, "champion", 1, uri=server)
    assert resolve(f"{name}@champion", uri=server).version == 1
    assert resolve(f"{name}/2", uri=server).aliases == ()


def test_a_reference_to_nothing_names_what_exists(
    server: str, name: str, new_run: NewRun, tmp_path: Path
) -> None:
    name = f"0-{name}"  # the line names the first twenty, and other tests may have registered more
    register(name, exported(tmp_path / "a"), new_run().run_id, {}, uri=server)
    set_alias(name, "champion", 1, uri=server)
    refusals = {
        f"{name}@challenger": rf"alias 'challenger': not set; {name} has champion -> 1, versions 1",
        f"{name}/7": rf"version 7: not registered; {name} has versions 1",
        "no-such-model@champion": rf"model 'no-such-model': not in the registry; it has .*{name}",
        "just-a-name": "not a reference; write name@alias or name/version",
    }
    for reference, message in refusals.items():
        with pytest.raises(UserError, match=message):
            resolve(reference, uri=server)
    with pytest.raises(UserError, match="not registered"):
        set_alias(name, "champion", 7, uri=server)


def test_tampered_weights_are_refused_and_not_left_behind(
    server: str, client: "MlflowClient", name: str, new_run: NewRun, tmp_path: Path
) -> None:
    version = register(name, exported(tmp_path / "a"), new_run().run_id, {}, uri=server)
    forged = tmp_path / "forged" / "model.safetensors"
    forged.parent.mkdir()
    data = bytearray((tmp_path / "a" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    forged.write_bytes(data)
    assert version.model_id is not None
    client.log_model_artifact(version.model_id, str(forged), "artifacts/model")
    with pytest.raises(DamageError, match=rf"{name}/1: model.safetensors has sha256"):
        download(version, tmp_path / "download", uri=server)
    assert list((tmp_path / "download").iterdir()) == []


def test_a_card_that_was_changed_is_refused_and_one_without_a_recorded_hash_is_taken_with_a_word(
    server: str,
    client: "MlflowClient",
    name: str,
    new_run: NewRun,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    version = register(name, exported(tmp_path / "a"), new_run().run_id, {}, uri=server)
    assert version.tags["card_sha256"] == file_sha256(tmp_path / "a" / "model.json")
    download(version, tmp_path / "sound", uri=server)
    assert caplog.text == ""
    forged = tmp_path / "forged" / "model.json"
    forged.parent.mkdir()
    forged.write_bytes((tmp_path / "a" / "model.json").read_bytes().replace(b"linear", b"cosine") + b" ")
    assert version.model_id is not None
    client.log_model_artifact(version.model_id, str(forged), "artifacts/model")
    with pytest.raises(DamageError, match=rf"{name}/1: model.json has sha256"):
        download(version, tmp_path / "download", uri=server)
    assert list((tmp_path / "download").iterdir()) == []
    client.delete_model_version_tag(name, "1", "card_sha256")
    download(resolve(f"{name}/1", uri=server), tmp_path / "old", uri=server)
    assert f"model {name}/1: its model.json cannot be verified" in caplog.text


def test_a_download_keeps_what_is_right_and_replaces_what_is_not(
    server: str, name: str, new_run: NewRun, tmp_path: Path
) -> None:
    version = register(name, exported(tmp_path / "a"), new_run().run_id, {}, uri=server)
    folder = download(version, tmp_path / "download", uri=server)
    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    download(version, folder, uri=server)
    assert weights.stat().st_mtime_ns == before
    weights.write_bytes(b"torn")
    download(version, folder, uri=server)
    assert file_sha256(weights) == version.sha256


def test_versions_of_other_programs_are_listed_but_not_downloaded(
    server: str, client: "MlflowClient", name: str, new_run: NewRun, tmp_path: Path
) -> None:
    client.create_registered_model(name)
    run = new_run()
    client.create_model_version(name, f"runs:/{run.run_id}/elsewhere", run.run_id, await_creation_for=0)
    version = resolve(f"{name}/1", uri=server)
    assert version.sha256 == ""
    with pytest.raises(UserError, match="has no sha256 tag"):
        download(version, tmp_path, uri=server)


def test_an_incomplete_export_is_refused_before_anything_is_made(
    server: str, name: str, new_run: NewRun, tmp_path: Path
) -> None:
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UserError, match=r"no model\.safetensors here"):
        register(name, tmp_path, new_run().run_id, {}, uri=server)
    assert versions(name, uri=server) == []


def test_everything_a_version_needs_is_protected(
    server: str, name: str, new_run: NewRun, tmp_path: Path
) -> None:
    checkpoint = "s3://ddpm/runs/x/checkpoints/0012000"
    version = register(
        name, exported(tmp_path / "a"), new_run().run_id, {}, checkpoint_uri=checkpoint, uri=server
    )
    places = protected_model_sources(uri=server)
    assert {version.source, checkpoint} <= places
    assert any(place.endswith(f"/models/{version.model_id}/artifacts") for place in places)


def test_a_run_leads_to_the_model_it_used(
    server: str, client: "MlflowClient", name: str, new_run: NewRun, tmp_path: Path
) -> None:
    training, generation = new_run("training"), new_run("generation")
    version = register(name, exported(tmp_path / "a"), training.run_id, {}, uri=server)
    link_model(generation.run_id, version, uri=server)
    seen = client.get_run(generation.run_id)
    assert seen.data.tags["ddpm.model"] == f"{name}/1"
    assert seen.data.tags["ddpm.model_sha256"] == version.sha256
    assert seen.data.tags["ddpm.training_run"] == training.run_id
    assert [model.model_id for model in seen.inputs.model_inputs] == [version.model_id]


def test_the_package_holds_no_pickle_no_path_of_this_machine_and_no_secret(
    server: str,
    client: "MlflowClient",
    name: str,
    new_run: NewRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "zebra-crossing-secret")
    tags = {"note": "zebra-crossing-secret"}
    version = register(
        name, exported(tmp_path / "a"), new_run().run_id, tags, "zebra-crossing-secret", uri=server
    )
    assert "zebra" not in repr(version)
    from mlflow.artifacts import download_artifacts

    folder = Path(download_artifacts(version.source, dst_path=str(tmp_path / "all"), tracking_uri=server))
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    files.remove("registered_model_meta")  # the download's own note
    assert files == [
        "MLmodel",
        "artifacts/model/model.json",
        "artifacts/model/model.safetensors",
        "input_example.json",
        "pyfunc_model.py",
        "python_env.yaml",
        "requirements.txt",
        "serving_input_example.json",
    ]
    assert (folder / "requirements.txt").read_text().startswith(f"ddpm-pipeline=={__version__}\n")
    for file in ("MLmodel", "python_env.yaml", "requirements.txt"):
        text = (folder / file).read_text()
        assert str(tmp_path) not in text
        assert os.getcwd() not in text


def test_mlflow_itself_can_load_the_model_and_draw_the_same_images(
    server: str, name: str, new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = register(name, exported(tmp_path / "a"), new_run().run_id, {}, uri=server)
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    import pandas as pd

    mlflow.set_tracking_uri(server)
    loaded = mlflow.pyfunc.load_model(f"models:/{version.reference}")
    images = loaded.predict({"seed": 3, "count": 2, "class": 5, "steps": 4})
    assert images.shape == (2, 8, 8, 1)
    assert images.dtype == np.uint8
    net, card = load_model(tmp_path / "a")
    with torch.inference_mode():
        expected = sample(
            net,
            NoiseSchedule.from_config(card.schedule),
            SamplerConfig(kind="ddim", num_steps=4),
            index=torch.arange(2),
            shape=(1, 8, 8),
            seed=3,
            class_labels=torch.full((2,), 5),
            objective=card.objective,
        )
    np.testing.assert_array_equal(images, to_uint8(expected).permute(0, 2, 3, 1).numpy())
    second = loaded.predict(pd.DataFrame([{"seed": 3, "count": 1, "class": 5, "steps": 4, "first_index": 1}]))
    np.testing.assert_allclose(second[0].astype(int), images[1].astype(int), atol=1)
    with pytest.raises(mlflow.MlflowException, match=r"Model is missing inputs.*seed"):
        loaded.predict({"colour": 1})
    with pytest.raises(ValueError, match="colour: unknown; known are seed"):
        loaded.unwrap_python_model().predict(None, {"colour": 1})
    assert loaded.input_example == {"seed": 0, "count": 4}
    signature = loaded.metadata.signature
    assert [(field.name, field.required) for field in signature.inputs][:3] == [
        ("seed", True),
        ("count", False),
        ("class", False),
    ]
    assert signature.outputs.inputs[0].shape == (-1, 8, 8, 1)


def test_a_model_shows_what_was_measured_of_it_and_on_what(
    server: str, name: str, new_run: NewRun, client: "MlflowClient", tmp_path: Path
) -> None:
    run = new_run()
    version = register(name, exported(tmp_path / "a"), run.run_id, {}, uri=server)
    assert version.model_id is not None
    for step, loss in ((4, 0.5), (8, 0.25), (12, 0.125)):
        client.log_metric(run.run_id, "eval/loss", loss, timestamp=1000 + step, step=step)
    data = MeasuredOn("digits", "0123456789abcdef")
    for _ in range(2):  # repeated after a crash
        tell_model_metrics(run.run_id, version.model_id, ["eval/loss", "none"], 8, data, uri=server)
        log_model_metrics(
            run.run_id,
            version.model_id,
            {"gate/frechet": 3.5, "gate/kernel": float("nan")},
            8,
            2.0,
            data,
            uri=server,
        )
    told = client.get_logged_model(version.model_id).metrics or []
    assert sorted((m.key, m.value, m.step, m.dataset_name, m.dataset_digest) for m in told) == [
        ("eval/loss", 0.25, 8, "digits", "0123456789abcdef"),
        ("gate/frechet", 3.5, 8, "digits", "0123456789abcdef"),
    ]
    assert [p.step for p in client.get_metric_history(run.run_id, "eval/loss")] == [4, 8, 12]
    assert client.get_run(run.run_id).data.metrics["gate/frechet"] == 3.5


def test_a_run_stands_below_the_run_of_the_model_it_starts_from(server: str, new_run: NewRun) -> None:
    parent = new_run()
    child = new_run("child", parent_run_id=parent.run_id)
    lost = new_run("lost", parent_run_id="0" * 32)
    elsewhere = open_run(
        f"other-{uuid.uuid4().hex[:8]}",
        "child",
        key="child",
        params={},
        tags={},
        config_yaml="",
        parent_run_id=parent.run_id,
        uri=server,
    )
    found = [tracking_client(server).get_run(run.run_id).data.tags for run in (child, elsewhere, lost)]
    assert [tags.get("mlflow.parentRunId") for tags in found] == [parent.run_id, None, None]
