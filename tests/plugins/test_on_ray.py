"""A package installed on every node: its network, sampler, schedule and images on a Ray cluster of their own."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.jobs.runner import PROGRAM
from tests.built_wheel import REPOSITORY
from tests.driving import ended_after
from tests.environments import output_of
from tests.plugins.conftest import PACKAGE, write_metadata

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(900)]

SETTINGS = {
    "pack": {"source": "plugin:blobs", "source_settings": {"count": 24}, "channels": 1, "shard_size": 12},
    "train": {
        "name": "blobs",
        "net": {
            "kind": "tiny-dit",
            "image_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "num_classes": 4,
            "null_class": True,
            "settings": {"depth": 1},
        },
        "schedule": {"kind": "quadratic", "num_steps": 50},
        "label_drop": 0.1,
        "global_batch": 6,
        "steps": 8,
        "log_every_steps": 2,
        "checkpoint": {"every_steps": 4, "eval_samples": 8},
        "grid": {"every_steps": 8, "count": 4, "sampler": {"kind": "second-order", "num_steps": 2}},
        "workers": {"num_workers": 2},
    },
    "generate": {
        "model": "blobs@champion",
        "count": 20,
        "shard_size": 5,
        "batch_size": 5,
        "sampler": {"kind": "second-order", "num_steps": 3},
        "guards": {"enabled": False},
    },
}


Command = Callable[..., str]


@pytest.fixture
def ddpm(tmp_path: Path, bare_environ: dict[str, str]) -> Iterator[Command]:
    """What a command prints, which must succeed, in a folder with a stack whose processes all find the package."""
    installed = [str(write_metadata(tmp_path / "site", "1.0.0")), str(PACKAGE), str(REPOSITORY)]
    environ = {**bare_environ, "PYTHONPATH": os.pathsep.join(installed)}
    local = LocalStack(tmp_path / ".local", "file", num_cpus=4, environ=environ)
    with ended_after(local):
        local.up()
        yield lambda *words: output_of([sys.executable, *PROGRAM, *words], tmp_path, environ)


def test_it_is_trained_by_two_workers_registered_and_its_samples_are_made_again(
    ddpm: Command, tmp_path: Path
) -> None:
    uris = {name: f"file://{tmp_path}/{name}" for name in ("data", "runs", "samples")}
    for path in ("runs", "samples"):
        (tmp_path / path).mkdir()
    settings = {
        "pack": SETTINGS["pack"] | {"dest": uris["data"]},
        "train": SETTINGS["train"] | {"data": {"uri": uris["data"]}, "runs": uris["runs"]},
        "generate": SETTINGS["generate"] | {"output": uris["samples"]},
    }
    (tmp_path / "blobs.yaml").write_text(yaml.safe_dump(settings))
    for job, said in (("pack", "24 images"), ("train", "blobs/1"), ("generate", "20 images in 4 shards")):
        assert said in ddpm(job, "--config", "blobs.yaml")
    assert "sound and complete" in ddpm("verify", uris["samples"], "--regenerate", "4")
