"""Readings of GPUs: what a card reports is read, what it does not report is None, and nothing is raised."""

import logging
import sys

import pynvml
import pytest

from ddpm_pipeline.devices import nvml
from ddpm_pipeline.devices.energy import EnergyMeter
from ddpm_pipeline.devices.nvml import visible_gpus
from tests.devices.fake_nvml import FakeCard, FakeDriver, install

MIG = "MIG-22222222-aaaa-bbbb-cccc-000000000000"
SECOND = "GPU-11112222-aaaa-bbbb-cccc-000000000000"


def test_a_card_reports_its_load_memory_power_and_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCard())
    (gpu,) = visible_gpus()
    now = gpu.read()
    assert gpu.name == "NVIDIA H100 80GB HBM3"
    assert (now.load_percent, now.memory_used_bytes, now.memory_total_bytes) == (87, 20 * 2**30, 80 * 2**30)
    assert (now.power_watts, now.power_limit_watts, now.temperature_celsius) == (350, 700, 61)
    assert gpu.energy_joules() == 5000


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_without_a_driver_there_is_one_look_no_gpu_and_no_message(
    code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks: list[int] = []

    def no_driver() -> None:
        looks.append(code)
        raise pynvml.NVMLError(code)

    driver = FakeDriver([])
    monkeypatch.setattr(driver, "nvmlInit", no_driver)
    monkeypatch.setitem(sys.modules, "pynvml", driver)  # type: ignore[arg-type]
    nvml._nvml.cache_clear()
    with caplog.at_level(logging.INFO):
        assert [visible_gpus(), visible_gpus()] == [(), ()]
    nvml._nvml.cache_clear()
    assert len(looks) == 1
    assert not caplog.records


def test_a_card_that_lacks_power_still_reports_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCard(unsupported={"power", "energy", "load"}))
    (gpu,) = visible_gpus()
    now = gpu.read()
    assert (now.load_percent, now.power_watts, now.power_limit_watts) == (None, None, None)
    assert now.memory_used_bytes == 20 * 2**30
    assert EnergyMeter([gpu]).joules() is None


def test_a_lost_gpu_is_told_once_and_reads_as_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card = FakeCard()
    install(monkeypatch, card)
    (gpu,) = visible_gpus()
    meter = EnergyMeter([gpu])
    card.lost = True
    assert gpu.read().memory_used_bytes is None
    assert meter.joules() is None
    gpu.read()
    assert [record.message for record in caplog.records] == [
        "a GPU of this machine no longer answers: GPU is lost"
    ]


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["a", "b"]),
        ("1,0", ["b", "a"]),
        ("1", ["b"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,7,1", ["a"]),  # CUDA ignores what follows an unknown device
        (SECOND, ["b"]),
        ("GPU-11112222", ["b"]),
        ("GPU-1111", []),  # the beginning of both
        (f" {MIG} ", ["slice"]),
        ("MIG-of-another-machine", []),
    ],
)
def test_only_the_gpus_that_this_process_may_use_are_read(
    visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [FakeCard(name="a"), FakeCard(name="b", uuid=SECOND)]
    install(monkeypatch, *cards, slices={MIG: FakeCard(name="slice")})
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in visible_gpus()] == names


def test_energy_is_the_difference_of_the_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [FakeCard(), FakeCard(millijoules=0)]
    install(monkeypatch, *cards)
    meter = EnergyMeter(visible_gpus())
    cards[0].millijoules += 7_000
    cards[1].millijoules += 500
    assert meter.joules() == 7.5


def test_without_a_counter_power_is_summed_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    card, now = FakeCard(unsupported={"energy"}, milliwatts=100_000), [0.0]
    install(monkeypatch, card)
    meter = EnergyMeter(visible_gpus(), clock=lambda: now[0])
    now[0], card.milliwatts = 2.0, 300_000
    assert meter.joules() == 400
    now[0] = 3.0
    assert meter.joules() == 700
    card.unsupported.add("power")
    assert meter.joules() is None
    card.unsupported.discard("power")
    assert meter.joules() is None, "the part that was missed would be left out"


def test_no_gpu_has_no_energy() -> None:
    assert EnergyMeter([]).joules() is None
