"""The training job on the real stack: refusals, and what is said of services that are not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from infra.local import LocalStack
from jobs.runner import PROGRAM
from pipeline.config.data import PackConfig
from pipeline.data.packing.pack_dataset import pack
from pipeline.store import open_store
from tests.train.tiny import tiny

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def data(stack: LocalStack) -> str:
    uri = "s3://ddpm/tests/train-digits"
    pack(PackConfig(source="digits", dest=uri, channels=1, shard_size=300), None)
    return uri


def test_a_lost_cluster_or_store_is_refused_in_one_line(data: str, prefix: str, tmp_path: Path) -> None:
    config = tiny(data, prefix, name="refused", track={"experiment": "tests-refused"})
    for variables, said, code in [
        ({"RAY_JOB_ADDRESS": "http://127.0.0.1:9"}, "Ray", 1),
        ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "MLflow at http://127.0.0.1:9: no answer", 1),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "key", 2),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "127.0.0.1:9", 1),
    ]:
        settings = tmp_path / "settings.yaml"
        settings.write_text(yaml.safe_dump({"train": config.model_dump(mode="json")}))
        done = subprocess.run(
            [sys.executable, *PROGRAM, "train", "--config", str(settings)],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        lines = done.stderr.strip().splitlines()
        assert done.returncode == code, done.stderr
        assert lines[-1].startswith({1: "failed: ", 2: "error: "}[code]), done.stderr
        assert said in lines[-1]
        assert "Traceback" not in done.stderr
    assert list(open_store(config.runs).list()) == []
