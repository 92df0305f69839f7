"""The lists of a vast generation, in a folder and of a server that answers as S3 does: the benchmark, but smaller."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import benchmarks.listings
from benchmarks.listings import BUCKET_URI, fill, is_missing, vast_spec
from ddpm_pipeline.generate.spec import Spec

SHARDS = 3_100  # pages of a thousand keys


@pytest.fixture(autouse=True)
def several_shards_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.listings, "GAP", 700)
    assert sum(map(is_missing, range(SHARDS))) == 5


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spec]:
    server = benchmarks.listings.make_server(SHARDS)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield vast_spec(SHARDS)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("task", benchmarks.listings.TASKS)
def test_many_pages_of_shards_are_listed_to_the_end(task: str, spec: Spec) -> None:
    benchmarks.listings.TASKS[task](spec, BUCKET_URI)


def test_a_folder_of_many_shards_is_listed_to_the_end(tmp_path: Path) -> None:
    uri = fill(tmp_path, SHARDS)
    for task in benchmarks.listings.TASKS.values():
        task(vast_spec(SHARDS), uri)
