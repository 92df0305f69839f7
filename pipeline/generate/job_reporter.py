"""What a driver reports while it generates: progress, metrics, the MLflow run, heartbeats and stall warnings."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.generate import heartbeat
from ddpm_pipeline.generate.coordinator import ShardProgress
from ddpm_pipeline.generate.efficiency import Efficiency
from ddpm_pipeline.generate.generation_cost import Cost
from ddpm_pipeline.generate.generation_run import GenerationRun
from ddpm_pipeline.generate.manifest import Manifest
from ddpm_pipeline.generate.sample_worker import Outcome
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.store import StoreUnreachable, retry_during_outage
from ddpm_pipeline.telemetry.logs import name_process
from ddpm_pipeline.telemetry.prometheus import JobMetrics
from ddpm_pipeline.telemetry.stall import StallDetector

_log = logging.getLogger(__name__)

Status = Literal["complete", "already complete", "failed", "stopped by a guard", "drained", "superseded"]


@dataclass
class JobCounts:
    """What a job has done so far."""

    made: set[int] = field(default_factory=set[int])
    """Numbers of the shards this job has written."""
    images_made: int = 0
    """Images in those shards."""
    images_before: int = 0
    """Images in shards that were done before this job, or by other jobs, when that was last counted."""
    images_elsewhere: int = 0
    """Images in shards that other jobs have finished since, as their heartbeats say."""
    made_twice: int = 0
    """Shards that another job finished while this one sampled them."""
    errors: dict[int, str] = field(default_factory=dict[int, str])
    """The last error of each failed shard, by number; some may be retried."""

    def images_in_progress(self, in_progress: Sequence[ShardProgress]) -> int:
        """Images sampled in shards that are not done yet."""
        return sum(unit.images for unit in in_progress if unit.shard not in self.made)


class JobReporter:
    """Reports one job. Never blocks the work, and survives an unreachable store."""

    def __init__(
        self,
        config: GenerateConfig,
        generation: Generation,
        progress: Progress,
        began: float,
    ) -> None:
        """`began`: time.monotonic() at the job's start."""
        spec = generation.spec
        name_process(run=f"{spec.model.name}-{spec.digest[:10]}")
        self._generation = generation
        self._run = GenerationRun(config, spec)
        self._metrics = JobMetrics("generate", spec.model.name)
        self._progress = progress
        self._began = began
        self._began_at = time.time()
        self.job = heartbeat.new_job_id()
        """Names the job in its heartbeat."""
        self._stall, self._last_progress = StallDetector(), (-1, 0)

    @property
    def run_url(self) -> str | None:
        """The web page of the MLflow run; None without tracking."""
        return self._run.url

    def start(self, counts: JobCounts) -> None:
        """Delete the heartbeats of jobs that have ended, and write the first one."""
        heartbeat.clear_ended(self._generation.store)
        self.write_heartbeat("running", counts)

    def count(self, outcome: Outcome) -> None:
        """Count an outcome in the job's metrics."""
        if outcome.status == "done" and outcome.record is not None:
            self._metrics.add("ddpm_shards_done")
            self._metrics.add("ddpm_shards_retried", int(outcome.record.times.attempt > 1))
            self._metrics.add("ddpm_shards_made_twice", int(outcome.made_twice))
        elif outcome.status == "failed":
            self._metrics.add("ddpm_shards_failed")

    def report(
        self,
        counts: JobCounts,
        in_progress: Sequence[ShardProgress],
        efficiency: Efficiency | None = None,
        cost: Cost | None = None,
        others: Sequence[str] = (),
        waits_for: int = 0,
    ) -> None:
        """Report progress; call it about twice a second.

        `efficiency`: of the shards that GPUs have finished; `cost`: of the shards whose records are known; `others`:
        jobs that share the work; `waits_for`: shards of theirs without which there is nothing left to do.
        """
        total = self._generation.spec.count
        images = counts.images_made + counts.images_in_progress(in_progress)
        done = min(total, counts.images_before + counts.images_elsewhere + images)
        rate = images / max(1e-9, time.monotonic() - self._began)
        failed = len(counts.errors)
        sharing = f"waiting for {waits_for} shards of" if waits_for else "shared with"
        notes = [f"{len(in_progress)} shards in progress"] + [f"{failed} failed"] * bool(failed)
        notes += [f"{sharing} {' and '.join(others)}"] * bool(others)
        self._progress(done, total, ", ".join(notes))
        self._metrics.gauge("ddpm_images_done", done)
        self._metrics.gauge("ddpm_images_per_second", rate)
        if efficiency is not None:
            for gauge, value in (
                ("ddpm_images_per_joule", efficiency.images_per_joule),
                ("ddpm_mfu", efficiency.mfu),
            ):
                if value is not None:
                    self._metrics.gauge(gauge, value)
        self._metrics.add_counted()
        self._run.progress(done, rate, failed, len(in_progress), counts.made_twice, efficiency, cost)
        self._warn_if_stalled((done, failed), in_progress, others if waits_for else ())

    def complete(
        self,
        manifest: Manifest,
        sheet: bytes,
        report: bytes,
        efficiency: Efficiency | None = None,
        cost: Cost | None = None,
    ) -> None:
        """Report a complete generation: its manifest, contact sheet (PNG) and report (HTML)."""
        self._run.complete(manifest, sheet, report, efficiency, cost)
        self._progress(manifest.count, manifest.count, "complete")

    def end(self, status: Status, counts: JobCounts, reason: str | None) -> None:
        """Write the last heartbeat, or delete it if the job was superseded, and close the MLflow run."""
        try:
            if status == "superseded":
                retry_during_outage(lambda: heartbeat.delete_heartbeat(self._generation.store, self.job))
            elif status != "complete":
                self.write_heartbeat(status, counts)
        finally:
            if status == "superseded":
                self._run.leave()
            else:
                self._run.end(status == "complete", killed=status == "drained", reason=reason)

    def _warn_if_stalled(
        self, progress: tuple[int, int], in_progress: Sequence[ShardProgress], awaited: Sequence[str]
    ) -> None:
        if progress != self._last_progress:
            self._last_progress = progress
            self._stall.progress()
        elif (seconds := self._stall.due()) is not None:
            _log.warning("%s", stall_reason(self._generation, seconds, in_progress, awaited))

    def write_heartbeat(
        self,
        status: Status | Literal["running"],
        counts: JobCounts,
        in_progress: Sequence[ShardProgress] = (),
        announced: Sequence[int] = (),
    ) -> None:
        """Tell other jobs, and `ddpm status`, what this one has done, has in hand and hands out next."""
        beat = heartbeat.make_heartbeat(
            self.job,
            self._generation.spec,
            status,
            began_at=self._began_at,
            images_made=counts.images_made,
            in_progress=in_progress,
            failed={
                self._generation.shard(number).name: text for number, text in sorted(counts.errors.items())
            },
            announced=announced,
        )
        try:
            heartbeat.write_heartbeat(self._generation.store, beat)
        except StoreUnreachable as error:
            # Workers wait for the store, so the driver keeps waiting too.
            _log.warning("no heartbeat: %s", error)


def stall_reason(
    generation: Generation,
    seconds: float,
    in_progress: Sequence[ShardProgress],
    awaited: Sequence[str] = (),
) -> str:
    """One line on what a job without progress may be waiting for; `awaited`: other jobs that it waits for."""
    if awaited:
        what = f"the last shards are those of {' and '.join(awaited)}"
    elif in_progress:
        oldest = min(in_progress, key=lambda unit: unit.began_at)
        name, age = generation.shard(oldest.shard).name, max(0.0, time.time() - oldest.began_at)
        what = (
            f"worker {oldest.worker} has been on shard {name} for {age:.0f} s "
            "(sampling, or waiting for the object store)"
        )
    else:
        what = "no shard is in progress (Ray is starting workers, or waiting for resources)"
    return f"no progress for {seconds:.0f} s: {what}"
