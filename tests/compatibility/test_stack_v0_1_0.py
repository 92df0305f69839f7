"""On the real stack: a model that version 0.1.0 registered is resolved, loaded and sampled from, and a generation that
it made is extended.

`v0.1.0/registered/` holds that version's MLflow package (without the weights, which are those of `v0.1.0/model`) and
the tags and aliases that it set.
"""

import json
import shutil
import tempfile
import uuid
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ddpm_pipeline.generate.driver import generate
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.jobs.ray_session import ray_cluster
from ddpm_pipeline.store import open_store
from ddpm_pipeline.tracking import download, open_run, resolve, tracking_client
from ddpm_pipeline.tracking.alias_log import LoggedAlias
from tests.generate.tiny import settings

pytestmark = [pytest.mark.stack, pytest.mark.timeout(180)]
STORED = Path(__file__).parent / "v0.1.0"
RECORD: dict[str, Any] = json.loads((STORED / "registered/record.json").read_text())


@pytest.fixture
def registered(stack: LocalStack) -> str:
    """Name of a model that is registered as version 0.1.0 left it, by MLflow's own client."""
    name = f"old-{uuid.uuid4().hex[:12]}"
    client = tracking_client()
    run = open_run("compatibility", name, key=name, params={}, tags={}, config_yaml="a: 1\n")
    logged = client.create_logged_model(
        run.experiment_id, RECORD["logged_name"], run.run_id, RECORD["logged_tags"], model_type="diffusion"
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(STORED / "registered/package", folder, dirs_exist_ok=True)
        shutil.copytree(STORED / "model", Path(folder) / "artifacts/model")
        client.log_model_artifacts(logged.model_id, folder)
    client.finalize_logged_model(logged.model_id, "READY")
    client.create_registered_model(name, tags=RECORD["model_tags"])
    client.create_model_version(
        name,
        f"models:/{logged.model_id}",
        run.run_id,
        RECORD["version_tags"],
        description=RECORD["description"],
        await_creation_for=0,
        model_id=logged.model_id,
    )
    for alias, version in RECORD["aliases"].items():
        client.set_registered_model_alias(name, alias, version)
    return name


def test_a_registered_model_is_resolved_with_its_bytes_and_its_history(
    registered: str, tmp_path: Path
) -> None:
    version = resolve(f"{registered}@champion")
    assert (version.version, version.sha256) == (1, RECORD["version_tags"]["sha256"])
    folder = download(version, tmp_path / "download")
    for name in ("model.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (STORED / "model" / name).read_bytes()
    history = LoggedAlias(registered).read()
    assert history.last is not None
    assert (history.version, history.last.number, history.last.kind) == (1, 1, "first")


def test_the_code_stored_beside_a_registered_model_still_runs(registered: str) -> None:
    import mlflow

    images = mlflow.pyfunc.load_model(f"models:/{registered}/1").predict({"seed": 0, "count": 2, "steps": 3})
    assert (images.shape, str(images.dtype)) == ((2, 4, 4, 1), "uint8")


@pytest.mark.long
def test_a_generation_is_extended_around_the_shards_it_has(stack: LocalStack, tmp_path: Path) -> None:
    shutil.copytree(STORED, tmp_path / "stored")
    place = f"file://{tmp_path}/stored/samples"
    before = open_store(f"file://{STORED}/samples")
    config = settings(tmp_path / "stored/model", place, count=40)
    with ray_cluster():
        assert generate(config, cluster=nullcontext).status == "complete"
    report = verify(place)
    assert (report.ok, report.complete, report.samples_checked) == (True, True, 40)
    for key in ("shards/000000.tar", "shards/000001.tar", "done/000000.json", "done/000001.json"):
        assert open_store(place).read(key) == before.read(key), key
