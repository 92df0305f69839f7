"""What a generation costs: from its records to manifest, report, status, summary and the points of its run."""

import json
import shutil
from pathlib import Path

import pytest

from ddpm_pipeline.config.cost import CostConfig
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.diffusion.timesteps import make_grid
from ddpm_pipeline.generate.done_records import GpuUse, RecordAggregate
from ddpm_pipeline.generate.driver import generate
from ddpm_pipeline.generate.generation_cost import Cost, cost_of_generation, cost_of_records
from ddpm_pipeline.generate.manifest import Manifest, make_manifest, read_manifest
from ddpm_pipeline.generate.plan import shard
from ddpm_pipeline.jobs.generate import summary
from ddpm_pipeline.jobs.status import generation_status
from ddpm_pipeline.store import open_store
from tests.generate.inprocess import without_cluster
from tests.generate.tiny import contents, fill, settings, tiny_card, tiny_model, writer_of

OLD = Path(__file__).parents[1] / "compatibility" / "v0.1.0" / "samples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def cost(**changes: object) -> Cost:
    known: dict[str, object] = {"evaluations_per_image": 20, "images": 500, "device_seconds": 25.0}
    return Cost.model_validate(known | changes)


def stored(output: str) -> Manifest:
    manifest = read_manifest(open_store(output))
    assert manifest is not None
    return manifest


def test_costs_are_of_a_thousand_images() -> None:
    found = cost(joules=50.0, price=CostConfig(per_device_hour=7.2))
    assert found.metrics() == {
        "cost/evaluations_per_image": 20,
        "cost/images_per_device_second": 20,
        "cost/device_seconds_per_1000_images": 50,
        "cost/joules_per_1000_images": 100,
        "cost/money_per_1000_images": pytest.approx(0.1),
    }
    assert found.text() == (
        "20 network evaluations per image, 20 images per device second, 50 device seconds per 1,000 images, "
        "100 joules per 1,000 images, 0.1 USD per 1,000 images"
    )


def test_what_is_not_known_is_left_out() -> None:
    found = cost(evaluations_per_image=None)
    assert found.metrics().keys() == {
        "cost/images_per_device_second",
        "cost/device_seconds_per_1000_images",
    }
    assert cost(images=0, device_seconds=0).metrics() == {"cost/evaluations_per_image": 20}
    assert cost_of_records(RecordAggregate(), 20, CostConfig()) is None


def test_a_worker_with_half_a_gpu_is_charged_half_of_its_time(model: Path, tmp_path: Path) -> None:
    writer = writer_of(settings(model, f"file://{tmp_path}/out"))
    records = RecordAggregate()
    for number, use in enumerate([("A", 0.5, 3.0), ("A", 1.0, 4.0)]):
        record = writer.write(shard(writer.generation.spec, number)).record
        gpu = GpuUse(name=use[0], share=use[1], joules=use[2])
        times = record.times.model_copy(update={"gpu": gpu, "seconds": 10.0})
        records.add(number, record.model_copy(update={"times": times}))
    assert (records.seconds, records.joules) == (15.0, 7.0)
    assert (records.gpus.images, records.gpus.seconds) == (20, {"A": 15.0})
    found = cost_of_records(records, 3, CostConfig(per_device_hour=3600))
    assert found is not None
    assert (found.images_per_device_second, found.money_per_1000) == (20 / 15, 750.0)


def test_energy_that_one_shard_lacks_is_not_known(model: Path, tmp_path: Path) -> None:
    writer = writer_of(settings(model, f"file://{tmp_path}/out", count=20))
    records = RecordAggregate()
    record = writer.write(shard(writer.generation.spec, 0)).record
    gpu = GpuUse(name="A", share=1.0, joules=3.0)
    with_gpu = record.model_copy(update={"times": record.times.model_copy(update={"gpu": gpu})})
    records.add(0, with_gpu)
    records.add(1, writer.write(shard(writer.generation.spec, 1)).record)
    assert records.joules is None
    manifest = make_manifest(writer.generation.spec, records, None, 3)
    assert "joules" not in manifest.model_dump(mode="json")["times"]


def test_the_manifest_states_every_evaluation_of_the_network(model: Path, tmp_path: Path) -> None:
    grid = make_grid(NoiseSchedule.from_config(tiny_card().schedule), SamplerConfig(kind="heun", num_steps=5))
    sampler = SamplerConfig(
        kind="heun", num_steps=5, guidance_scale=2.0, guidance_interval=(grid.sigma(2), grid.sigma(1))
    )
    output = f"file://{tmp_path}/out"
    fill(settings(model, output, count=10, sampler=sampler))
    # Nine calls, of levels 0 to 4 and 1 to 4; levels 1 and 2 are guided, and each is called twice.
    assert stored(output).evaluations_per_image == 9 + 4


def test_manifests_of_one_spec_differ_in_times_only_whatever_the_price(model: Path, tmp_path: Path) -> None:
    found: list[dict[str, bytes]] = []
    pages: list[str] = []
    for name, price in (("a", {}), ("b", {"per_device_hour": 2.5, "currency": "EUR"})):
        config = settings(model, f"file://{tmp_path}/{name}", cost=price)
        with without_cluster():
            assert generate(config).status == "complete"
        found.append(contents(open_store(config.output)))
        pages.append(open_store(config.output).read("report.html").decode())
    assert found[0] == found[1]
    assert '"evaluations_per_image": 3' in found[0]["manifest.json"].decode()
    assert all("network evaluations per image</th><td>3<" in page for page in pages)
    assert all("device seconds per 1,000 images" in page for page in pages)
    assert ("EUR per 1,000 images" in pages[0], "EUR per 1,000 images" in pages[1]) == (False, True)


def test_the_summary_tells_the_cost_when_made_and_when_complete_already(model: Path, tmp_path: Path) -> None:
    config = settings(model, f"file://{tmp_path}/out", cost={"per_device_hour": 9.0})
    with without_cluster():
        made, again = generate(config), generate(config)
    assert (made.status, again.status) == ("complete", "already complete")
    assert made.cost is not None
    assert made.cost == again.cost
    for result in (made, again):
        (line,) = [line for line in summary(result) if line.startswith("cost ")]
        assert line.startswith("cost     3 network evaluations per image, ")
        assert line.endswith(" USD per 1,000 images")


def test_the_status_of_a_complete_generation_tells_the_cost(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"file://{tmp_path}/out"
    fill(settings(model, output))
    assert generation_status(output, as_json=False) == 0
    printed = capsys.readouterr().out
    assert "3 network evaluations per image" in printed
    assert generation_status(output, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["cost"]["evaluations_per_image"] == 3


def test_a_generation_of_version_0_1_0_has_a_cost_without_evaluations(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "samples")
    manifest = stored(f"file://{tmp_path}/samples")
    assert "evaluations_per_image" not in manifest.model_dump(mode="json")
    found = cost_of_generation(manifest)
    assert (found.evaluations_per_image, found.joules) == (None, None)
    assert found.images_per_device_second == manifest.count / manifest.times.device_seconds
