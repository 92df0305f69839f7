"""Readings of NVIDIA GPUs through the driver's library, NVML. They cost microseconds and use no memory of the GPU."""

import functools
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuReading:
    """The state of a GPU at one moment; None for what this GPU or its driver does not report."""

    load_percent: float | None
    """Share of the last moments, up to a second, in which a kernel was running."""
    memory_used_bytes: float | None
    memory_total_bytes: float | None
    power_watts: float | None
    power_limit_watts: float | None
    temperature_celsius: float | None


class Gpu:
    """A GPU, or a MIG slice of one, which reports memory and little else."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._is_lost = False
        self.name: str = self._ask(nvml.nvmlDeviceGetName) or "NVIDIA GPU"
        """As the driver names it, such as `NVIDIA H100 80GB HBM3`."""

    def read(self) -> GpuReading:
        """Its state now. Quick; never raises."""
        nvml = self._nvml
        load = self._ask(nvml.nvmlDeviceGetUtilizationRates)
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo)
        limit = self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit)
        return GpuReading(
            load_percent=None if load is None else float(load.gpu),
            memory_used_bytes=None if memory is None else float(memory.used),
            memory_total_bytes=None if memory is None else float(memory.total),
            power_watts=self.power_watts(),
            power_limit_watts=None if limit is None else limit / 1000,
            temperature_celsius=self._ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        )

    def power_watts(self) -> float | None:
        """Its power now; None where it is not reported."""
        milliwatts = self._ask(self._nvml.nvmlDeviceGetPowerUsage)
        return None if milliwatts is None else milliwatts / 1000

    def energy_joules(self) -> float | None:
        """Energy since the driver was loaded; None on GPUs before Volta and on MIG slices, which do not count it."""
        millijoules = self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if millijoules is None else millijoules / 1000

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The answer of a function of NVML; None where this GPU does not support it, or is gone."""
        try:
            return function(self._handle, *arguments)
        except self._nvml.NVMLError_GpuIsLost as error:
            if not self._is_lost:
                log.warning("a GPU of this machine no longer answers: %s", error)
            self._is_lost = True
        except self._nvml.NVMLError as error:
            log.debug("no reading of a GPU: %s", error)
        return None


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs that this process may use, in the order of CUDA_VISIBLE_DEVICES; none without a driver.

    That variable may hold indexes, UUIDs, beginnings of UUIDs, and ids of MIG slices. Indexes count in the order of the
    PCI bus, which is also CUDA's order where all GPUs of a machine are of one kind.
    """
    nvml = _nvml()
    if nvml is None:
        return ()
    try:
        return tuple(Gpu(nvml, handle) for handle in _handles(nvml, os.environ.get("CUDA_VISIBLE_DEVICES")))
    except nvml.NVMLError as error:
        log.debug("no readings of GPUs: %s", error)
        return ()


@functools.cache
def _nvml() -> Any:
    """The bindings, connected to the driver; None without one. Looks once: a driver does not appear meanwhile."""
    nvml: Any = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        log.debug("no readings of GPUs: %s", error)
        return None
    return nvml


def _handles(nvml: Any, visible: str | None) -> list[Any]:
    """NVML's handles of the visible GPUs. Like CUDA, ignores everything from the first unknown entry on."""
    all_handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if visible is None:
        return all_handles
    handles: list[Any] = []
    for entry in (part.strip() for part in visible.split(",")):
        found = _matching(nvml, entry, all_handles)
        if len(found) != 1:
            break
        handles += found
    return handles


def _matching(nvml: Any, entry: str, handles: list[Any]) -> list[Any]:
    """The GPUs that an entry of CUDA_VISIBLE_DEVICES may mean."""
    if entry.isdecimal():
        return handles[int(entry) : int(entry) + 1]
    if entry.startswith("GPU-"):
        return [handle for handle in handles if nvml.nvmlDeviceGetUUID(handle).startswith(entry)]
    if not entry.startswith("MIG-"):
        return []
    try:
        return [nvml.nvmlDeviceGetHandleByUUID(entry)]
    except nvml.NVMLError:
        return []
