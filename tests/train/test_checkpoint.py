"""Checkpoints: valid or skipped, never incomplete, and never an obstacle to a restart."""

import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpm_pipeline import retry
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.store import FileStore, ObjectInfo, Store, StoreUnreachable, open_store
from ddpm_pipeline.train import checkpoint
from ddpm_pipeline.train.checkpoint import (
    RECORD,
    STATE,
    CheckpointWriter,
    checkpoint_uri,
    finished_steps,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from ddpm_pipeline.train.state import initial_state
from ddpm_pipeline.train.step_metrics import StepMetrics
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
    assert ("20 skipped" in caplog.text) == (damage != "no record")


def test_damage_names_the_object(store: Store) -> None:
    save_checkpoint(store, 10, TENSORS, "id")
    file_of(store, 10, "state.safetensors").write_bytes(b"x")
    with pytest.raises(DamageError, match=r"000000000010/state\.safetensors: 1 bytes, its record says"):
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
    prune_checkpoints(store, keep_last=1, protected={checkpoint_uri(store, 20)})
    assert finished_steps(store) == [20, 40]


def test_the_one_before_the_newest_stays_for_who_is_reading_it(store: Store) -> None:
    writer = CheckpointWriter(store, "id", keep_last=1)
    for step in (10, 20, 30):
        writer.submit(step, TENSORS)
    writer.wait()
    assert finished_steps(store) == [20, 30]


class Pruned(FileStore):
    """A store in which another group writes and deletes checkpoints while this one reads."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.newer: list[int] = []
        """Each is written, and all before it deleted, when a state is asked for."""
        self.moment = STATE

    def _another_group(self, key: str) -> None:
        if self.newer and key.endswith(self.moment):
            other, step = FileStore(self.root), self.newer.pop(0)
            save_checkpoint(other, step, TENSORS, "id")
            prune_checkpoints(other, keep_last=1)

    def read(self, key: str) -> bytes:
        self._another_group(key)
        return super().read(key)

    def download(self, key: str, path: Path) -> None:
        self._another_group(key)
        super().download(key, path)


@pytest.mark.parametrize("moment", [STATE, RECORD])
@pytest.mark.parametrize("newer", [[30], [30, 40], [30, 40, 50]])
def test_checkpoints_deleted_after_they_were_listed_are_listed_again(
    tmp_path: Path, moment: str, newer: list[int]
) -> None:
    store = Pruned(tmp_path)
    for step in (10, 20):
        save_checkpoint(store, step, TENSORS, "id")
    store.newer, store.moment = list(newer), moment
    found = latest_checkpoint(store)
    assert found is not None
    assert found.record.step == newer[-1]


@pytest.mark.parametrize("loss", ["all damaged", "all deleted"])
def test_where_checkpoints_were_and_none_can_be_read_nothing_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    monkeypatch.setattr(checkpoint, "LISTING_PAUSE_SECONDS", 0.0)
    store = Pruned(tmp_path)
    for step in (10, 20):
        save_checkpoint(store, step, TENSORS, "id")
        if loss == "all damaged":
            store.path(f"checkpoints/{step:012d}/{STATE}").write_bytes(b"x")
    if loss == "all deleted":
        monkeypatch.setattr(store, "_another_group", lambda _: shutil.rmtree(tmp_path / "checkpoints", True))
    with pytest.raises(DamageError, match=r"checkpoints/: there are checkpoints and none .* delete them all"):
        latest_checkpoint(store)


def test_damage_on_the_way_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "LISTING_PAUSE_SECONDS", 0.0)
    store, times = FileStore(tmp_path), 0
    save_checkpoint(store, 10, TENSORS, "id")
    download = FileStore.download

    def flips_twice(key: str, path: Path) -> None:
        nonlocal times
        times += 1
        download(store, key, path)
        if times <= 2:
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    monkeypatch.setattr(store, "download", flips_twice)
    found = latest_checkpoint(store)
    assert found is not None
    assert found.record.step == 10


@pytest.mark.parametrize("name", ["²", "9" * 5000, "00000000001x", "10", "٠٠٠٠٠٠٠٠٠٠١٠"])
def test_a_folder_whose_name_is_no_step_is_no_checkpoint(
    store: Store, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(store, 10, TENSORS, "id")
    listed = [*store.list("checkpoints/"), ObjectInfo(f"checkpoints/{name}/record.json", 1, "")]
    monkeypatch.setattr(store, "list", lambda prefix: iter(listed))
    assert finished_steps(store) == [10]


@pytest.mark.parametrize(
    "change",
    [
        {"step": 11},
        {"step": -1},
        {"step": 10**30},
        {"size_bytes": 2**80},
        {"size_bytes": 5},
        {"sha256": "../../etc/passwd"},
        {"identity": "x" * 10_000},
        {"identity": ["x"]},
        {"eval_loss": "low"},
        {"more": 1},
    ],
)
def test_a_record_of_odd_values_is_damage_in_one_line_and_nothing_is_downloaded(
    store: Store, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(store, 10, TENSORS, "id")
    record = file_of(store, 10, "record.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    monkeypatch.delattr(type(store), "download")
    with pytest.raises(DamageError, match=r"000000000010/(record\.json|state\.safetensors): ") as refusal:
        load_checkpoint(store, 10)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b"[]", b"null", b"\xff\xfe", b'{"step": ' + b"9" * 5000 + b"}"]
)
def test_a_record_that_is_none_is_damage(store: Store, data: bytes) -> None:
    save_checkpoint(store, 10, TENSORS, "id")
    file_of(store, 10, "record.json").write_bytes(data)
    with pytest.raises(DamageError, match=r"record\.json: not a checkpoint record"):
        load_checkpoint(store, 10)


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
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
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


def lacking(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith("ema/")}


def misshapen(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros(3) if name.startswith("net/") else value for name, value in tensors.items()}


def empty(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {}


@pytest.mark.parametrize("change", [lacking, misshapen, empty])
def test_a_state_that_does_not_fit_is_damage_in_one_line(
    digits: str, runs: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    state = initial_state(tiny(digits, runs), torch.device("cpu"))
    with pytest.raises(DamageError, match="checkpoint 7 does not fit this network: "):
        state.load(7, change(contiguous(state.tensors())))


@pytest.mark.parametrize(
    "change",
    [
        {"losses": torch.tensor(1.0)},
        {"quartiles": torch.zeros(3)},
        {"counts": torch.zeros(5)},
        {"counts": torch.tensor([float("nan"), 0])},
        {"grad_norms": torch.zeros(2, 2)},
        {"grad_norms": None},
    ],
)
def test_sums_that_are_none_are_damage(change: dict[str, Tensor | None]) -> None:
    window = StepMetrics(10, torch.device("cpu"))
    window.open_step()
    tensors = window.tensors() | {f"window/{name}": value for name, value in change.items()}
    kept = {name: value for name, value in tensors.items() if value is not None}
    with pytest.raises(DamageError, match=r"window/\* tensors are damaged"):
        StepMetrics(10, torch.device("cpu")).load(kept, leads=True)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: NaN and -0 are compared too."""
    return tensor.reshape(-1).view(torch.uint8)


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in tensors.items()}
