"""The training job on the real stack: refusals, and what is said of services that are not there."""

from pathlib import Path

import pytest
import yaml

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.store import open_store
from tests.commands import ddpm
from tests.train.tiny import tiny

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def data(stack: LocalStack) -> str:
    uri = "s3://ddpm/tests/train-digits"
    pack(PackConfig(source="digits", dest=uri, channels=1, shard_size=300), None)
    return uri


def test_a_lost_cluster_or_store_is_refused_in_one_line(
    data: str,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny(data, prefix, name="refused", track={"experiment": "tests-refused"})
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({"train": config.model_dump(mode="json")}))
    for variables, said, code in [
        ({"RAY_JOB_ADDRESS": "http://127.0.0.1:9"}, "Ray", 1),
        ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "MLflow at http://127.0.0.1:9: no answer", 1),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "key", 2),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "127.0.0.1:9", 1),
    ]:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert ddpm("train", f"--config={settings}") == code
        printed = capsys.readouterr().err
        last = printed.strip().splitlines()[-1]
        assert last.startswith({1: "failed: ", 2: "error: "}[code]), printed
        assert said in last
        assert "Traceback" not in printed
    assert list(open_store(config.runs).list()) == []
