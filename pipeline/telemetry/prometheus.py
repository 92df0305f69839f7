"""Prometheus metrics, exported by Ray: the table of all metrics, and a handle that does nothing without Ray.

Ray prefixes each name with `ray_`. Dashboards and alerts (infra/grafana) may use only these; a test compares.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ddpm_pipeline.telemetry.counters import totals


@dataclass(frozen=True)
class MetricSpec:
    """One metric."""

    kind: Literal["gauge", "counter"]
    meaning: str


METRICS: dict[str, MetricSpec] = {
    "ddpm_images_per_second": MetricSpec("gauge", "Images trained on, or sampled, per second."),
    "ddpm_step": MetricSpec("gauge", "Finished steps of a training."),
    "ddpm_step_seconds": MetricSpec("gauge", "Mean seconds of a training step since the last report."),
    "ddpm_data_wait_share": MetricSpec("gauge", "Share of that time spent waiting for samples."),
    "ddpm_loss": MetricSpec("gauge", "Mean loss since the last report."),
    "ddpm_mfu": MetricSpec(
        "gauge", "Network operations a second over the peak of the GPUs, where it is known."
    ),
    "ddpm_images_per_joule": MetricSpec(
        "gauge", "Images sampled per joule of the GPUs, over finished shards."
    ),
    "ddpm_images_done": MetricSpec("gauge", "Finished images of a generation, over all attempts."),
    "ddpm_shards_done": MetricSpec("counter", "Shards a generation finished."),
    "ddpm_shards_failed": MetricSpec("counter", "Attempts at a shard that failed."),
    "ddpm_shards_retried": MetricSpec("counter", "Shards that were finished after the first attempt."),
    "ddpm_shards_made_twice": MetricSpec(
        "counter", "Shards that another job finished while this one sampled them."
    ),
    "ddpm_store_retries": MetricSpec("counter", "Retried calls of the object store."),
    "ddpm_cache_hits": MetricSpec("counter", "Shards found in the machine's cache."),
    "ddpm_cache_misses": MetricSpec("counter", "Shards downloaded into the cache."),
}
COUNTED = ("ddpm_store_retries", "ddpm_cache_hits", "ddpm_cache_misses")
"""Counted by lower layers in `ddpm_pipeline.telemetry.counters`, without the prefix `ddpm_`."""
LABELS = ("work", "run")  # `job` is Prometheus's own label of a scrape target


class JobMetrics:
    """A job's metrics. Calls never block, and do nothing without Ray."""

    def __init__(self, work: Literal["train", "generate"], run: str) -> None:
        """`run`: name of the training, or of the generation's model."""
        self._labels = {"work": work, "run": run}
        self._made: dict[str, Any] = {}
        self._reported: Mapping[str, int] = totals()

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge of `METRICS`."""
        metric = self._metric(name)
        if metric is not None:
            metric.set(value, tags=self._labels)

    def add(self, name: str, more: int = 1) -> None:
        """Increase a counter of `METRICS`; nothing for 0."""
        metric = self._metric(name) if more else None
        if metric is not None:
            metric.inc(more, tags=self._labels)

    def add_counted(self) -> None:
        """Increase the counters of lower layers by what they counted since the last call."""
        now = totals()
        for name in COUNTED:
            key = name.removeprefix("ddpm_")
            self.add(name, now.get(key, 0) - self._reported.get(key, 0))
        self._reported = now

    def _metric(self, name: str) -> Any:
        spec = METRICS[name]
        ray = sys.modules.get("ray")  # not imported here: a job without Ray would pay for it
        if ray is None or not ray.is_initialized():
            return None
        if name not in self._made:
            from ray.util import metrics

            make = metrics.Gauge if spec.kind == "gauge" else metrics.Counter
            self._made[name] = make(name, spec.meaning, tag_keys=LABELS)
        return self._made[name]
