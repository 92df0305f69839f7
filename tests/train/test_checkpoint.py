"""Checkpoints: whole or passed over, never half there, and never in the way of a restart."""

import logging
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline import patience
from pipeline.errors import DamageError
from pipeline.store import ObjectInfo, Store, StoreUnreachable, open_store
from pipeline.train.checkpoint import (
    CheckpointWriter,
    checkpoint_uri,
    finished_steps,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from pipeline.train.state import initial_state
from tests.train.tiny import tiny

TENSORS = {"net/weight": torch.arange(12.0).reshape(3, 4), "optimizer/step": torch.tensor(3.0)}


@pytest.fixture
def store(runs: str) -> Store:
    return open_store(f"{runs}/one")


def file_of(store: Store, step: int, name: str) -> Path:
    return Path(store.uri.removeprefix("file://")) / "checkpoints" / f"{step:012d}" / name


def test_what_is_saved_comes_back_bit_for_bit(store: Store) -> None:
    tensors = TENSORS | {"half": torch.tensor([1e-7, float("nan"), -0.0], dtype=torch.bfloat16)}
    save_checkpoint(store, 10, tensors, "id")
    found = load_checkpoint(store, 10)
    assert (found.record.step, found.record.identity) == (10, "id")
    assert found.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found.tensors[name].dtype == value.dtype
        assert torch.equal(bits(found.tensors[name]), bits(value)), name


def test_no_checkpoint_is_none(store: Store) -> None:
    assert latest_checkpoint(store) is None
    assert finished_steps(store) == []


@pytest.mark.parametrize("damage", ["cut", "flip", "no state", "no record", "torn record"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_with_a_warning(
    store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(store, 10, TENSORS, "id")
    save_checkpoint(store, 20, TENSORS, "id")
    state, record = file_of(store, 20, "state.safetensors"), file_of(store, 20, "record.json")
    if damage == "cut":
        state.write_bytes(state.read_bytes()[:-1])
    elif damage == "flip":
        state.write_bytes(state.read_bytes()[:-1] + b"\xff")
    elif damage == "torn record":
        record.write_bytes(record.read_bytes()[:20])
    else:
        (state if damage == "no state" else record).unlink()
    with caplog.at_level(logging.WARNING):
        found = latest_checkpoint(store)
    assert found is not None
    assert found.record.step == 10
    # one that was never finished is no damage: nothing claims that it is there
    assert ("20 passed over" in caplog.text) == (damage != "no record")


def test_damage_names_the_object(store: Store) -> None:
    save_checkpoint(store, 10, TENSORS, "id")
    file_of(store, 10, "state.safetensors").write_bytes(b"x")
    with pytest.raises(DamageError, match=r"000000000010/state\.safetensors: sha256"):
        load_checkpoint(store, 10)


def test_the_newest_are_kept(store: Store) -> None:
    for step in (10, 20, 30, 40):
        save_checkpoint(store, step, TENSORS, "id")
    prune_checkpoints(store, keep_last=2)
    assert finished_steps(store) == [30, 40]
    assert {info.key.split("/")[1] for info in store.list("checkpoints/")} == {"000000000030", "000000000040"}


def test_a_checkpoint_that_a_registered_model_was_cut_from_is_never_deleted(store: Store) -> None:
    for step in (10, 20, 30, 40):
        save_checkpoint(store, step, TENSORS, "id")
    prune_checkpoints(store, keep_last=1, spared={checkpoint_uri(store, 20)})
    assert finished_steps(store) == [20, 40]


def test_training_may_change_its_tensors_while_a_checkpoint_is_written(store: Store) -> None:
    writer = CheckpointWriter(store, "id", keep_last=2)
    tensor = torch.zeros(200_000)
    for step in (1, 2, 3):
        tensor.fill_(step)
        writer.submit(step, {"t": tensor})
        tensor.fill_(-1)
    writer.wait()
    assert finished_steps(store) == [2, 3]
    assert bool((load_checkpoint(store, 3).tensors["t"] == 3).all())


def test_an_error_of_the_writer_reaches_the_training(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(key: str, path: Path) -> ObjectInfo:
        raise OSError("disk full")

    monkeypatch.setattr(store, "upload", refuse)
    writer = CheckpointWriter(store, "id", keep_last=2)
    writer.submit(1, TENSORS)
    with pytest.raises(OSError, match="disk full"):
        writer.wait()
    writer.wait()  # once told, it is over


def test_a_checkpoint_outlives_an_outage_of_the_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSE_SECONDS", 0.01)
    outages, upload = 5, store.upload

    def away(key: str, path: Path) -> ObjectInfo:
        nonlocal outages
        outages -= 1
        if outages >= 0:
            raise StoreUnreachable("away")
        return upload(key, path)

    monkeypatch.setattr(store, "upload", away)
    writer = CheckpointWriter(store, "id", keep_last=2)
    writer.submit(1, TENSORS)
    writer.wait()
    assert load_checkpoint(store, 1).record.step == 1
    assert outages == -1


def test_submitting_does_not_wait_for_the_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, upload = threading.Event(), store.upload

    def slow(key: str, path: Path) -> ObjectInfo:
        assert gate.wait(30)
        return upload(key, path)

    monkeypatch.setattr(store, "upload", slow)
    writer = CheckpointWriter(store, "id", keep_last=2)
    writer.submit(1, TENSORS)
    assert finished_steps(store) == []
    gate.set()
    writer.wait()
    assert finished_steps(store) == [1]


def test_the_whole_state_of_a_training_goes_through_a_checkpoint(
    store: Store, digits: str, runs: str
) -> None:
    config = tiny(digits, runs)
    state = initial_state(config, torch.device("cpu"))
    for parameter in state.net.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    state.ema.update(state.net, 1)
    save_checkpoint(store, 1, contiguous(state.tensors()), "id")
    other = initial_state(config.model_copy(update={"seed": 9}), torch.device("cpu"))
    other.load(1, load_checkpoint(store, 1).tensors)
    assert other.step == 1
    again = other.tensors()
    for name, value in state.tensors().items():
        assert torch.equal(again[name], value), name
        assert again[name].stride() == value.stride(), f"{name}: the fused optimiser would mix its elements"


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: NaN and -0 are compared too."""
    return tensor.reshape(-1).view(torch.uint8)


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in tensors.items()}
