"""A driver's library that is not there: the functions of `pynvml` that the pipeline calls, with its real errors."""
# ruff: noqa: N802 - the names are NVML's

import types
from dataclasses import dataclass, field
from typing import Any

import pynvml
import pytest

from ddpm_pipeline.devices import nvml


@dataclass
class FakeCard:
    """A GPU as the driver would describe it. `unsupported`: functions that this card does not have."""

    name: str = "NVIDIA H100 80GB HBM3"
    uuid: str = "GPU-11111111-aaaa-bbbb-cccc-000000000000"
    load: int = 87
    used: int = 20 * 2**30
    total: int = 80 * 2**30
    milliwatts: int = 350_000
    limit_milliwatts: int = 700_000
    celsius: int = 61
    millijoules: int = 5_000_000
    unsupported: set[str] = field(default_factory=set)
    lost: bool = False


class FakeDriver(types.SimpleNamespace):
    """`pynvml` with these cards; `slices`: MIG slices by their id."""

    def __init__(self, cards: list[FakeCard], slices: dict[str, FakeCard] | None = None) -> None:
        super().__init__()
        self.cards, self.slices, self.starts = cards, slices or {}, 0
        self.NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
        self.NVMLError = pynvml.NVMLError
        self.NVMLError_GpuIsLost = pynvml.NVMLError_GpuIsLost

    def nvmlInit(self) -> None:
        self.starts += 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeCard:
        if uuid not in self.slices:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return self.slices[uuid]

    def nvmlDeviceGetUUID(self, card: FakeCard) -> str:
        return card.uuid

    def nvmlDeviceGetName(self, card: FakeCard) -> str:
        return self._of(card, "name", card.name)

    def nvmlDeviceGetUtilizationRates(self, card: FakeCard) -> Any:
        return self._of(card, "load", types.SimpleNamespace(gpu=card.load, memory=3))

    def nvmlDeviceGetMemoryInfo(self, card: FakeCard) -> Any:
        return self._of(card, "memory", types.SimpleNamespace(used=card.used, total=card.total))

    def nvmlDeviceGetPowerUsage(self, card: FakeCard) -> int:
        return self._of(card, "power", card.milliwatts)

    def nvmlDeviceGetEnforcedPowerLimit(self, card: FakeCard) -> int:
        return self._of(card, "power", card.limit_milliwatts)

    def nvmlDeviceGetTotalEnergyConsumption(self, card: FakeCard) -> int:
        return self._of(card, "energy", card.millijoules)

    def nvmlDeviceGetTemperature(self, card: FakeCard, sensor: int) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return self._of(card, "temperature", card.celsius)

    @staticmethod
    def _of(card: FakeCard, what: str, value: Any) -> Any:
        if card.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        if what in card.unsupported:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value


def install(
    monkeypatch: pytest.MonkeyPatch, *cards: FakeCard, slices: dict[str, FakeCard] | None = None
) -> FakeDriver:
    """Make these the machine's GPUs for a test, all of them visible."""
    driver = FakeDriver(list(cards), slices)
    monkeypatch.setattr(nvml, "_nvml", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return driver
