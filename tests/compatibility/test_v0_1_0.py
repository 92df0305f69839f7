"""What version 0.1.0 stored is still read: a packed data set, a checkpoint, a model, a generation.

`v0.1.0/` was written by that version: 60 digits in two shards, a training of 24 steps stopped after 9, and a
generation of 25 images.
"""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.inspect_dataset import inspect
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.train.checkpoint import latest_checkpoint
from ddpm_pipeline.train.training_plan import plan_training
from ddpm_pipeline.train.worker import TrainTask, train_local
from tests.train.tiny import tiny

STORED = Path(__file__).parent / "v0.1.0"


@pytest.fixture
def stored(tmp_path: Path) -> str:
    """A copy of what that version wrote, with the times of its shards, which its index knows them by."""
    place = tmp_path / "stored"
    shutil.copytree(STORED, place)
    for shard in json.loads((place / "data/index.json").read_text())["shards"]:
        modified_ns = int(shard["etag"].partition("-")[0], 16)
        os.utime(place / "data" / shard["name"], ns=(modified_ns, modified_ns))
    return f"file://{place}"


def test_a_data_set_keeps_its_digest_and_its_class_names(stored: str) -> None:
    index = load_index(f"{stored}/data")
    assert index.digest == "0ed9a34ff7df8d5954e50599a83840178fa124af1c795a083ab8d86aaeee5600"
    assert index.class_names == tuple("0123456789")
    assert (index.num_samples, inspect(f"{stored}/data").damage) == (60, ())


def test_a_training_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(
    stored: str, tmp_path: Path
) -> None:
    ends: list[dict[str, torch.Tensor]] = []
    for runs, expected in ((f"{stored}/runs", 9), (f"file://{tmp_path}/new", 0)):
        plan = plan_training(tiny(f"{stored}/data", runs))
        assert (plan.identity, plan.finished_steps) == ("86073595ece0", expected)
        task = TrainTask(plan.config, plan.identity, plan.store.uri, plan.index.digest)
        train_local(task, lambda *_: None, threading.Event())
        checkpoint = latest_checkpoint(plan.store)
        assert checkpoint is not None
        ends.append(dict(checkpoint.tensors))
    old, new = ends
    assert old.keys() == new.keys()
    # not bit for bit: the first steps may have been taken by another kind of processor
    for name in (name for name in new if name.startswith("net/")):
        torch.testing.assert_close(old[name], new[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_generation_is_sound(stored: str) -> None:
    report = verify(f"{stored}/samples")
    assert (report.ok, report.complete, report.samples_checked) == (True, True, 25)
