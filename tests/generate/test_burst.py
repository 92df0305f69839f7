"""Two Ray clusters fill one prefix of one object store, as a second cluster that is added for a burst does."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.infra.local import LocalStack, environment
from ddpm_pipeline.store import open_store
from tests.driving import Driver, ended_after
from tests.generate.tiny import contents, fill, settings, tiny_model

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(600)]

NUM_SHARDS = 100
_MADE = re.compile(r"made +[\d,]+ images in ([\d,]+) shards")
_TWICE = re.compile(r"twice +([\d,]+) shards")


@pytest.fixture
def burst(stack: LocalStack, tmp_path: Path, bare_environ: dict[str, str]) -> Iterator[dict[str, str]]:
    """Variables of a second Ray cluster that uses the session's S3."""
    outside = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "MLFLOW_"))}
    local = LocalStack(tmp_path / "burst", "s3", 2, environ=bare_environ | outside)
    with ended_after(local):
        local.up()
        yield dict(environment(local.root))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> GenerateConfig:
    """A generation that one process has made."""
    more: dict[str, object] = {
        "count": NUM_SHARDS * 8 - 3,
        "shard_size": 8,
        "num_workers": 1,
        "sampler": {"kind": "ddim", "num_steps": 50},
    }
    folder = tmp_path_factory.mktemp("calm")
    config = settings(tiny_model(folder / "model"), f"file://{folder}/out", **more)
    fill(config)
    return config


def number(pattern: re.Pattern[str], said: str) -> int:
    """The number in the last of what a job prints."""
    found = pattern.findall(said)
    return int(found[-1].replace(",", "")) if found else 0


def test_two_clusters_make_one_generation_and_hardly_a_shard_twice(
    calm: GenerateConfig, burst: dict[str, str], prefix: str, tmp_path: Path
) -> None:
    shared = calm.model_copy(update={"output": prefix})
    # At once: one that waits for the other's first shard may find all of them made, where starting takes long.
    jobs = [
        Driver("generate", shared, tmp_path / where, more) for where, more in (("home", {}), ("away", burst))
    ]
    for job in jobs:
        assert job.process.wait(300) == 0, job.said[-3000:]
    made = [number(_MADE, job.said) for job in jobs]
    assert sum(made) == NUM_SHARDS, (made, [job.said for job in jobs])
    assert min(made) > 0
    assert sum(number(_TWICE, job.said) for job in jobs) <= 0.02 * NUM_SHARDS
    assert all("shared   with the job of " in job.said for job in jobs)
    assert contents(open_store(shared.output)) == contents(open_store(calm.output))
