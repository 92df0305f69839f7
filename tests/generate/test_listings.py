"""The lists of a vast generation, against a server that answers as S3 does: the benchmark, with fewer shards."""

import threading
from collections.abc import Iterator

import pytest

import benchmarks.listings
from pipeline.generate.spec import Spec

SHARDS = 20_500


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spec]:
    monkeypatch.setattr(benchmarks.listings, "GAP", 5_000)  # several shards are missing
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
    yield benchmarks.listings.vast_spec(SHARDS)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("task", benchmarks.listings.TASKS)
def test_many_pages_of_shards_are_listed_to_the_end(task: str, spec: Spec) -> None:
    assert sum(benchmarks.listings.is_missing(number) for number in range(SHARDS)) == 5
    benchmarks.listings.TASKS[task](spec)
