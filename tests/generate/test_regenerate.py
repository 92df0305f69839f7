"""Samples made again: with the record's micro-batch, and apart from those of another device or software."""

from pathlib import Path

import pytest
import torch
from torch import nn

import ddpm_pipeline.generate.regenerate as regenerate_module
from ddpm_pipeline.generate.device_check import UnfitDevice
from ddpm_pipeline.generate.done_records import RecordAggregate, short_tag
from ddpm_pipeline.generate.engine import Engine
from ddpm_pipeline.generate.finalize import ModelFacts, publish_manifest
from ddpm_pipeline.generate.regenerate import regenerate
from ddpm_pipeline.generate.spec import write_spec
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.jobs.verify import lines
from ddpm_pipeline.store import open_store
from tests.commands import ddpm
from tests.generate.tiny import fill, settings, tiny_card, tiny_model, writer_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), tiny_card(size=8))


class Crowded(nn.Module):
    """A network whose memory runs out at one call, and whose rounding depends on the batch."""

    def __init__(self, net: nn.Module, fails_at: int) -> None:
        super().__init__()
        self.net = net
        self.null_label = net.null_label
        self.calls, self.fails_at = 0, fails_at

    def forward(self, x: torch.Tensor, *rest: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory (as a test says)")
        return self.net(x, *rest, **more) * (1 + 1e-3 * len(x))


@pytest.fixture
def crowded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A generation whose worker ran out of memory in the middle of its second of three shards."""
    uri = f"file://{tmp_path}/out"
    writer = writer_of(settings(model, uri, count=24, shard_size=8, batch_size=4))
    calls = 2 * 3  # two batches of three steps a shard
    net = Crowded(writer.engine._net, fails_at=calls + 5)
    writer.engine._net = net
    write_spec(writer.generation.store, writer.generation.spec)
    records = RecordAggregate()
    for unit in writer.generation.shards():
        record, tag, _ = writer.write(unit)
        records.add(unit.number, record, short_tag(tag))
    publish_manifest(writer.generation, records, ModelFacts(writer.engine.card.class_names))

    def engine(spec: object, net: nn.Module, card: object) -> Engine:
        return Engine(spec, Crowded(net, fails_at=-1), card)  # type: ignore[arg-type]

    monkeypatch.setattr(regenerate_module, "Engine", engine)
    return uri


def test_a_halved_micro_batch_is_that_of_a_whole_shard_and_can_be_verified(crowded: str, model: Path) -> None:
    report = verify(crowded)
    store = open_store(crowded)
    writer = writer_of(settings(model, crowded, count=24, shard_size=8, batch_size=4))
    used = [writer.generation.read_record(unit).times.micro_batch for unit in writer.generation.shards()]
    assert used == [4, 2, 2]
    assert store.stat("manifest.json") is not None
    regenerate(report, 24, str(model))
    assert (report.ok, report.regenerated, report.not_judged) == (True, 24, 0), report.problems[:2]


def test_the_specs_micro_batch_would_have_given_other_bytes(
    crowded: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = regenerate_module._read_record

    def whole(*args: object) -> object:
        record = read(*args)  # type: ignore[arg-type]
        assert record is not None
        return record.model_copy(update={"times": record.times.model_copy(update={"micro_batch": 4})})

    monkeypatch.setattr(regenerate_module, "_read_record", whole)
    report = verify(crowded)
    regenerate(report, 24, str(model))
    assert report.num_problems > 0


def test_what_other_software_makes_differently_is_not_judged(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"file://{tmp_path}/out"
    fill(settings(model, uri, count=20))
    monkeypatch.setattr(regenerate_module, "software", lambda spec: "torch 9, another chip")
    report = verify(uri)
    regenerate(report, 20, str(model))
    assert (report.ok, report.not_judged) == (True, 0)  # equal bytes need no judgment

    def rounds(spec: object, net: nn.Module, card: object) -> Engine:
        return Engine(spec, Crowded(net, fails_at=-1), card)  # type: ignore[arg-type]

    monkeypatch.setattr(regenerate_module, "Engine", rounds)
    report = verify(uri)
    regenerate(report, 20, str(model))
    assert (report.ok, report.num_problems) == (True, 0)
    assert report.not_judged > 0
    assert ddpm("verify", uri, "--regenerate", "20", "--model", str(model)) == 2
    said = capsys.readouterr().out
    assert "unjudged " in said
    assert "here is torch 9, another chip, which may round differently" in said
    monkeypatch.undo()
    monkeypatch.setattr(regenerate_module, "Engine", rounds)
    report = verify(uri)
    regenerate(report, 20, str(model))
    assert report.num_problems > 0  # by the software of the record: damaged
    assert report.not_judged == 0


def test_without_a_device_of_the_kind_nothing_is_judged(model: Path, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/out"
    fill(settings(model, uri, count=20))

    def unfit(*_: object) -> object:
        raise UnfitDevice("device: the generation is of a kind that is not here; use one")

    report = verify(uri)
    regenerate(report, 5, str(model), compare=unfit)  # type: ignore[arg-type]
    assert (report.ok, report.regenerated, report.not_judged) == (True, 0, 5)
    assert any(line.startswith("unjudged 5 samples: device: ") for line in lines(report))
