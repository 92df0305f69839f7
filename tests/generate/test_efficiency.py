"""What GPUs used is recorded beside each shard, and told of the whole generation."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.generate import gpu_meter
from ddpm_pipeline.generate.done_records import DoneRecord, GpuTotals, GpuUse, RecordAggregate
from ddpm_pipeline.generate.efficiency import EfficiencyCalculator
from ddpm_pipeline.generate.generation_job import GenerationResult
from ddpm_pipeline.generate.gpu_meter import GpuMeter
from ddpm_pipeline.generate.plan import shard
from ddpm_pipeline.generate.shard_writer import ShardWriter
from ddpm_pipeline.jobs.generate import summary
from ddpm_pipeline.nets.flops import forward_flops
from tests.devices.fake_nvml import FakeCard, install
from tests.generate.tiny import plan_of, settings, tiny_card, tiny_model, writer_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


class Working(FakeCard):
    """Uses 2 J between any two looks at its counter."""

    @property
    def millijoules(self) -> int:
        self.looks = getattr(self, "looks", 0) + 1
        return 2_000 * self.looks

    @millijoules.setter
    def millijoules(self, value: int) -> None:
        """Of the constructor."""


def with_gpu(writer: ShardWriter, share: float) -> ShardWriter:
    """The same writer on a GPU, as far as records go."""
    meter = GpuMeter("NVIDIA L4", share)
    return ShardWriter(writer.engine, writer.generation.store, writer.guards, gpu=meter)


def test_a_shard_made_by_a_gpu_names_it_and_its_share_of_the_energy(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Working(), FakeCard())
    writer = with_gpu(writer_of(settings(model, f"file://{tmp_path}/out")), 0.5)
    unit = shard(writer.generation.spec, 0)
    record = writer.write(unit).record
    # 10 images in batches of 4: one look before, and one after each of 3 batches
    assert record.times.gpu == GpuUse(name="NVIDIA L4", share=0.5, joules=3.0)
    assert writer.generation.read_record(unit) == record


def test_a_gpu_without_readings_is_named_and_its_energy_is_unknown(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    writer = with_gpu(writer_of(settings(model, f"file://{tmp_path}/out")), 1.0)
    record = writer.write(shard(writer.generation.spec, 0)).record
    assert record.times.gpu == GpuUse(name="NVIDIA L4", share=1.0, joules=None)


def test_records_of_cpus_have_the_fields_that_they_always_had(model: Path, tmp_path: Path) -> None:
    writer = writer_of(settings(model, f"file://{tmp_path}/out"))
    unit = shard(writer.generation.spec, 0)
    writer.write(unit)
    stored = json.loads(writer.generation.store.read(unit.done_key))
    assert "gpu" not in stored["times"]
    assert DoneRecord.model_validate(stored).times.gpu is None


def totals(**changes: object) -> GpuTotals:
    return GpuTotals(**{"images": 100, "seconds": {"NVIDIA L4": 4.0}, "joules": 200.0, **changes})  # type: ignore[arg-type]


def test_mfu_counts_every_evaluation_of_the_network(model: Path, tmp_path: Path) -> None:
    sampler = SamplerConfig(kind="heun", num_steps=3, guidance_scale=2.0, spacing="leading")
    spec, found = plan_of(settings(model, f"file://{tmp_path}/out", sampler=sampler))
    efficiency = EfficiencyCalculator(spec, found.card).of(totals())
    assert efficiency is not None
    assert (efficiency.images_per_gpu_second, efficiency.images_per_joule) == (25, 0.5)
    flops = 100 * 2 * 5 * forward_flops(tiny_card().net)
    assert efficiency.mfu == pytest.approx(flops / 4.0 / 30.3e12)


def test_what_is_not_known_is_left_out(model: Path, tmp_path: Path) -> None:
    spec, found = plan_of(settings(model, f"file://{tmp_path}/out"))
    calculator = EfficiencyCalculator(spec, found.card)
    unknown = calculator.of(totals(seconds={"NVIDIA L4": 2.0, "NVIDIA Z9000": 2.0}, joules=None))
    assert unknown is not None
    assert unknown.metrics() == {"perf/images_per_gpu_second": 25}
    assert str(unknown) == "NVIDIA L4 and NVIDIA Z9000, 25 images/s per GPU"
    assert calculator.of(GpuTotals()) is None


def test_totals_add_shares_and_forget_energy_that_one_shard_lacks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Working())
    records = RecordAggregate()
    writer = with_gpu(writer_of(settings(model, f"file://{tmp_path}/out")), 0.5)
    first = writer.write(shard(writer.generation.spec, 0)).record
    records.add(0, first)
    assert records.gpus == GpuTotals(10, {"NVIDIA L4": first.times.seconds / 2}, 3.0)
    monkeypatch.setattr(gpu_meter, "visible_gpus", lambda: ())
    records.add(1, with_gpu(writer, 1.0).write(shard(writer.generation.spec, 1)).record)
    assert (records.gpus.images, records.gpus.joules) == (20, None)


def test_the_summary_of_a_generation_tells_it() -> None:
    result = GenerationResult("complete", "file:///out", "0" * 64, 100, 10, 10, 100, 5.0)
    assert not any(line.startswith("gpu ") for line in summary(result))
    calculator = EfficiencyCalculator(SimpleNamespace(dtype="bfloat16"), tiny_card())  # type: ignore[arg-type]
    calculator.image_flops = 10**12
    told = summary(GenerationResult(**result.__dict__ | {"efficiency": calculator.of(totals())}))
    assert "gpu      NVIDIA L4, 25 images/s per GPU, 0.5 images per joule, MFU 20.7%" in told
