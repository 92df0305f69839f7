"""A node's load is read by one worker of it, and whatever goes wrong there, the training goes on."""

import json
import logging
import time
from pathlib import Path

import pytest

from ddpm_pipeline.config.tracking import TrackConfig
from ddpm_pipeline.devices.nvml import visible_gpus
from ddpm_pipeline.tracking.spool import SPOOL_VARIABLE
from ddpm_pipeline.tracking.system_metrics import gpu_metrics
from ddpm_pipeline.train.run_logger import log_node_metrics
from tests.devices.fake_nvml import FakeCard, install

NOWHERE = "http://127.0.0.1:9"
READING = TrackConfig(system_metrics_seconds=1.0, close_timeout_seconds=0.0)


@pytest.fixture(autouse=True)
def spools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(SPOOL_VARIABLE, str(tmp_path / "spools"))
    return tmp_path / "spools"


def points(folder: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in (folder / "points.jsonl").read_text().splitlines():
        found |= json.loads(line)["m"]
    return found


def test_load_and_memory_of_the_node_go_to_a_spool_even_while_mlflow_is_away(spools: Path) -> None:
    with log_node_metrics(NOWHERE, "run", "node1", time.time() - 100, READING):
        deadline = time.monotonic() + 30
        while not (spools / "run-node1/points.jsonl").exists() or not points(spools / "run-node1"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    read = points(spools / "run-node1")
    assert set(read) == {
        f"system/node1/{name}"
        for name in (
            "cpu_utilization_percentage",
            "process_cpu_percentage",
            "process_memory_megabytes",
            "system_memory_usage_percentage",
            "system_memory_usage_megabytes",
            "disk_usage_percentage",
            "disk_usage_megabytes",
            "disk_available_megabytes",
            "network_receive_megabytes",
            "network_transmit_megabytes",
        )
    }
    assert 0 < read["system/node1/system_memory_usage_percentage"] <= 100
    first = json.loads((spools / "run-node1/points.jsonl").read_text().splitlines()[0])
    assert 100 <= first["s"] < 200, "counted from the run's first start"


def test_each_gpu_has_mlflows_names_and_only_what_it_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCard(), FakeCard(unsupported={"power", "load"}))
    first, second = (gpu_metrics(gpu) for gpu in visible_gpus())
    assert first == {
        "utilization_percentage": 87,
        "memory_usage_percentage": 25,
        "memory_usage_megabytes": 20 * 2**30 / 1e6,
        "power_usage_watts": 350,
        "power_usage_percentage": 50,
        "temperature_celsius": 61,
    }
    assert first.keys() - second.keys() == {
        "utilization_percentage",
        "power_usage_watts",
        "power_usage_percentage",
    }


@pytest.mark.parametrize(("on_gpus", "names"), [(True, {"gpu_0", "gpu_1"}), (False, set[str]())])
def test_a_nodes_gpus_are_read_beside_its_processor_if_the_training_uses_them(
    on_gpus: bool, names: set[str], spools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeCard(), FakeCard())
    with log_node_metrics(NOWHERE, "run", "node1", time.time(), READING, on_gpus=on_gpus):
        deadline = time.monotonic() + 30
        while not (spools / "run-node1/points.jsonl").exists() or not points(spools / "run-node1"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    read = points(spools / "run-node1")
    assert {name.removeprefix("system/node1/")[:5] for name in read if "gpu_" in name} == names


@pytest.mark.parametrize(
    ("run_id", "node", "config"),
    [
        (None, "node0", READING),
        ("run", None, READING),
        ("run", "node0", TrackConfig(system_metrics_seconds=None)),
    ],
)
def test_without_a_run_on_other_workers_and_when_switched_off_nothing_is_read(
    spools: Path, run_id: str | None, node: str | None, config: TrackConfig
) -> None:
    with log_node_metrics(NOWHERE, run_id, node, 0.0, config):
        pass
    assert not spools.exists()


def test_a_spool_that_cannot_be_made_is_a_warning(spools: Path, caplog: pytest.LogCaptureFixture) -> None:
    spools.mkdir()
    (spools / "run-node0").write_text("in the way")
    entered = False
    with caplog.at_level(logging.WARNING), log_node_metrics(NOWHERE, "run", "node0", 0.0, READING):
        entered = True
    assert entered
    assert "no system metrics of node0" in caplog.text
