"""Processor, memory, disk, network and GPU readings of a node, logged through the spool."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import psutil

from ddpm_pipeline.tracking.spool import Spool

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

    from ddpm_pipeline.devices.nvml import Gpu

log = logging.getLogger(__name__)


class SystemSampler:
    """Reads this node's load at a fixed interval until closed; start one per node.

    Metrics are named `system/<node>/...`, which the run page shows under "System metrics", and as MLflow names its own;
    their step is the number of seconds since the run's first start, so that a resumed run continues the charts.
    """

    def __init__(
        self,
        spool: Spool,
        *,
        started_seconds: float,
        node: str = "node0",
        interval_seconds: float = 30.0,
        gpus: Sequence[Gpu] = (),
    ) -> None:
        """`gpus`: those of the node that the job uses, in the order of their numbers in the charts."""
        self._spool = spool
        self._started = started_seconds
        self._node = node
        self._interval = interval_seconds
        self._gpus = gpus
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read_until_closed, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; call it before closing the spool."""
        self._stop.set()
        self._thread.join(5.0)

    def _read_until_closed(self) -> None:
        process, monitors = psutil.Process(), _monitors()
        psutil.cpu_percent()  # the first call only starts the interval that the next one measures
        process.cpu_percent()
        while not self._stop.wait(self._interval):
            try:
                self._spool.metrics(int(time.time() - self._started), self._readings(process, monitors))
            except psutil.Error as error:
                log.warning("system metrics of %s: one reading failed (%s)", self._node, error)

    def _readings(self, process: psutil.Process, monitors: Sequence[BaseMetricsMonitor]) -> dict[str, float]:
        found: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            found |= cast(dict[str, float], monitor.aggregate_metrics())
            monitor.clear_metrics()
        found["process_cpu_percentage"] = process.cpu_percent()
        found["process_memory_megabytes"] = process.memory_info().rss / 1e6
        for number, gpu in enumerate(self._gpus):
            found |= {f"gpu_{number}_{name}": value for name, value in gpu_metrics(gpu).items()}
        return {f"system/{self._node}/{name}": value for name, value in found.items()}


def _monitors() -> list[BaseMetricsMonitor]:
    """MLflow's own, of processor, memory, disk and network. Its monitor of GPUs reads all of a node, and no part of
    one, so ours are read by `devices.nvml`."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    return [CPUMonitor(), DiskMonitor(), NetworkMonitor()]


def gpu_metrics(gpu: Gpu) -> dict[str, float]:
    """What a GPU reports now, under the names that MLflow gives these metrics."""
    now = gpu.read()
    memory_share = _percent(now.memory_used_bytes, now.memory_total_bytes)
    readings = {
        "utilization_percentage": now.load_percent,
        "memory_usage_percentage": memory_share,
        "memory_usage_megabytes": None if now.memory_used_bytes is None else now.memory_used_bytes / 1e6,
        "power_usage_watts": now.power_watts,
        "power_usage_percentage": _percent(now.power_watts, now.power_limit_watts),
        "temperature_celsius": now.temperature_celsius,
    }
    return {name: value for name, value in readings.items() if value is not None}


def _percent(part: float | None, whole: float | None) -> float | None:
    return 100 * part / whole if part is not None and whole else None
