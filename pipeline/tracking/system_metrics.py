"""CPU and memory readings of a node, logged through the spool."""

import logging
import threading
import time

import psutil

from pipeline.tracking.spool import Spool

log = logging.getLogger(__name__)


class SystemSampler:
    """Reads this node's load at a fixed interval until closed; start one per node.

    Metrics are named `system/<node>/...`, which the run page shows under "System metrics"; their step is the number of
    seconds since the run's first start, so that a resumed run continues the charts.
    """

    def __init__(
        self, spool: Spool, *, started_seconds: float, node: str = "node0", interval_seconds: float = 30.0
    ) -> None:
        self._spool = spool
        self._started = started_seconds
        self._node = node
        self._interval = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read_until_closed, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; call it before closing the spool."""
        self._stop.set()
        self._thread.join(5.0)

    def _read_until_closed(self) -> None:
        process = psutil.Process()
        psutil.cpu_percent()  # the first call only starts the interval that the next one measures
        process.cpu_percent()
        while not self._stop.wait(self._interval):
            try:
                self._spool.metrics(int(time.time() - self._started), self._readings(process))
            except psutil.Error as error:
                log.warning("system metrics of %s: one reading failed (%s)", self._node, error)

    def _readings(self, process: psutil.Process) -> dict[str, float]:
        memory = psutil.virtual_memory()
        prefix = f"system/{self._node}"
        return {
            f"{prefix}/cpu_utilization_percentage": psutil.cpu_percent(),
            f"{prefix}/process_cpu_percentage": process.cpu_percent(),
            f"{prefix}/system_memory_usage_percentage": memory.percent,
            f"{prefix}/process_memory_megabytes": process.memory_info().rss / 1e6,
        }
