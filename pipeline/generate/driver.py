"""A generation from settings to manifest: plan, pool, retries, reconciliation, and the proof at the very end."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pipeline.config.generation import GenerateConfig
from pipeline.features.networks import network_exists, open_network
from pipeline.features.trust import require_trusted_network
from pipeline.generate import heartbeat as beats
from pipeline.generate.completeness import Completeness, check_complete
from pipeline.generate.coordinator import ShardProgress
from pipeline.generate.finalize import Superseded, clean_up, publish_manifest, require_newest
from pipeline.generate.generation_run import GenerationRun, require_tracking
from pipeline.generate.guards import check_guards
from pipeline.generate.listing import RecordAggregate, aggregate_records, list_prefix
from pipeline.generate.model_source import ResolvedModel, resolve_model
from pipeline.generate.plan import num_shards, shard
from pipeline.generate.proven_count import check_prefix, raise_count
from pipeline.generate.ray_pool import OutcomeStream, WorkerPool, require_pool_resources, start_pool
from pipeline.generate.sample_worker import Outcome, SampleWorkerConfig
from pipeline.generate.shard_writer import comparable_training_data
from pipeline.generate.spec import Spec, require_extension
from pipeline.generate.spec_claim import claim_prefix
from pipeline.store import Store, StoreUnreachable, open_store, retry_during_outage
from pipeline.telemetry.logs import name_process
from pipeline.telemetry.prometheus import JobMetrics
from pipeline.telemetry.stall import StallDetector

_log = logging.getLogger(__name__)

Status = Literal["complete", "already complete", "failed", "stopped by a guard", "drained", "superseded"]
TICK_SECONDS = 0.5
_DRAIN_MARGIN_SECONDS = 5.0


class Progress(Protocol):
    """Told that `done` of `total` images are sampled; `note` says more in a few words."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@dataclass(frozen=True)
class GenerationResult:
    """How a generation ended."""

    status: Status
    """`drained`: ended on request, go on with the same command; `superseded`: another job raised the count."""
    output: str
    spec_digest: str
    count: int
    num_shards: int
    shards_made: int
    """By this call."""
    images_made: int
    """By this call."""
    seconds: float
    """From the first look at the plan to the end."""
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """Shards given up, with the last error of each."""
    reason: str | None = None
    """What the guard said, or who superseded this job."""
    run_url: str | None = None
    company: tuple[str, ...] = ()
    """Other jobs that were at work on the same generation when this one began, and shared it."""

    @property
    def images_per_second(self) -> float:
        """Over this call, starting and finishing included."""
        return self.images_made / self.seconds if self.seconds > 0 else 0.0


def silent(done: int, total: int, note: str = "") -> None:
    """Progress for those who do not want any."""


def generate(
    config: GenerateConfig,
    progress: Progress = silent,
    *,
    stop: threading.Event | None = None,
    cluster: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> GenerationResult:
    """Fill the output prefix; safe to repeat after any interruption, and quick when all is done already.

    `cluster` connects to Ray for as long as its context lasts; by default Ray must be connected. Once `stop` is set,
    shards under way are finished or given up and the call returns. UserError, before anything is written, for what
    the user can put right; RuntimeError when Ray itself gives up.
    """
    began = time.monotonic()
    model, spec = resolve_model(config)
    store = open_store(config.output)
    store.require_container()
    there = check_prefix(store, spec)
    proof = Completeness() if there is None else check_complete(store, spec)
    if proof.complete:
        raise_count(store, spec)
        clean_up(store, spec, proof)
        progress(spec.count, spec.count, "already complete")
        return GenerationResult(
            "already complete", config.output, spec.digest, spec.count, num_shards(spec), 0, 0, 0.0
        )
    for fault in proof.faults:
        _log.warning("there is a manifest, but %s; it is made anew", fault)
    require_tracking(config)
    config = _with_network(config, None if model.version is None else model.name)
    with cluster():
        require_pool_resources(config)
        if there is None:
            require_extension(store, claim_prefix(store, spec), spec)
        require_extension(
            store, raise_count(store, spec), spec
        )  # another job may have raised it further meanwhile
        diary = GenerationRun(config, spec, model)
        job = GenerationJob(config, spec, model, store, diary, progress, stop or threading.Event(), began)
        return job.run()


def _with_network(config: GenerateConfig, registered: str | None) -> GenerateConfig:
    """`config`, once its feature network is known to be usable and the one by which the registered model is judged, or
    without one that may be missing and is.
    """
    if config.features is None:
        return config
    if config.features_missing == "skip" and not network_exists(config.features):
        _log.warning("no feature sums: there is no %s (yet); see ddpm features train", config.features.uri)
        return config.model_copy(update={"features": None})
    network = open_network(config.features, "")  # what is wrong with it is said now
    require_trusted_network(registered, config.features, "", network)
    return config


class GenerationJob:
    """The driver's side of a generation: hands out what is missing until nothing is, then publishes."""

    def __init__(
        self,
        config: GenerateConfig,
        spec: Spec,
        model: ResolvedModel,
        store: Store,
        diary: GenerationRun,
        progress: Progress,
        stop: threading.Event,
        began: float,
    ) -> None:
        self.config = config
        self.spec = spec
        self.model = model
        self.store = store
        self.diary = diary
        self.stop = stop
        self._meters = JobMetrics("generate", spec.model.name)
        name_process(run=f"{spec.model.name}-{spec.digest[:10]}")
        self._progress = progress
        self._began = began
        self._began_at = time.time()
        self._id = beats.new_job_id()
        self._next_beat = 0.0
        self._harvest = RecordAggregate()
        self._made: set[int] = set()
        self._images_made = 0
        self._images_before = 0
        self._errors: dict[int, str] = {}
        self._guard: str | None = None
        self._lost: str | None = None
        self._company: tuple[str, ...] = ()
        self._quiet, self._heard = StallDetector(), (-1, 0)

    def run(self) -> GenerationResult:
        """Work until complete, drained, stopped or out of attempts."""
        status: Status = "failed"
        try:
            beats.clear_ended(self.store)
            self._company = tuple(
                _introduced(beat) for beat in beats.read_heartbeats(self.store) if beat.alive
            )
            self._beat("running", [])
            try:
                status = self._work()
            except Superseded as overtaken:
                status, self._lost = "superseded", str(overtaken)
            return self._result(status)
        finally:
            try:
                if status == "superseded":
                    retry_during_outage(lambda: beats.delete_heartbeat(self.store, self._id))
                elif status != "complete":
                    self._beat(status, [])
            finally:
                if status == "superseded":
                    self.diary.leave()
                else:
                    self.diary.end(
                        status == "complete", killed=status == "drained", reason=self._reason(status)
                    )

    def _work(self) -> Status:
        crew: WorkerPool | None = None
        names = self.model.card.class_names
        for _ in range(self.config.max_attempts):
            retry_during_outage(lambda: require_newest(self.store, self.spec, names))
            pending = retry_during_outage(self._pending)
            if not pending:
                return retry_during_outage(self._publish)
            if crew is None:
                order = SampleWorkerConfig(
                    self.spec,
                    self.model.card,
                    self.config.output,
                    self.config.guards,
                    self.config.max_attempts,
                    self.config.features,
                )
                crew = start_pool(order, self.model.weights)
            if not self._round(crew, pending):
                return "drained" if self._guard is None else "stopped by a guard"
        return "failed" if retry_during_outage(self._pending) else retry_during_outage(self._publish)

    def _pending(self) -> list[int]:
        """Shards still to be made: by the records' listing; once none is missing there, by all that can be checked."""
        missing = list_prefix(self.store, self.spec, objects=False).missing()
        if not missing:
            missing = self._undone()
        done = self.spec.count - sum(shard(self.spec, number).count for number in missing)
        self._images_before = done - self._images_made
        return missing

    def _undone(self) -> list[int]:
        """Shards that have a record but no sound object, or no sound record. Workers see the same and replace both.

        No record is deleted: by now another job may have replaced it, and completed the generation with it.
        """
        found = list_prefix(self.store, self.spec)
        undone = [(number, "its object is missing") for number in found.missing()]
        undone += aggregate_records(self.store, self.spec, found, self._harvest)
        for number, reason in undone:
            self._errors[number] = reason
            self._made.discard(number)
        if undone:
            self._harvest = RecordAggregate()  # its sums cannot be taken apart; the records are read again
        return sorted(number for number, _ in undone)

    def _round(self, crew: WorkerPool, pending: list[int]) -> bool:
        """Try each pending shard once. False when the job is to end: drained, or stopped by a guard."""
        stream = OutcomeStream(self.config, crew, pending)
        deadline: float | None = None
        try:
            while (outcomes := stream.poll(TICK_SECONDS)) is not None:
                for outcome in outcomes:
                    self._take(outcome)
                under_way = crew.under_way()
                self._tick(under_way)
                if self._guard is not None:
                    crew.drain(0)
                    return False
                if self.stop.is_set() and deadline is None:
                    crew.drain(self.config.drain_seconds)
                    deadline = time.monotonic() + self.config.drain_seconds + _DRAIN_MARGIN_SECONDS
                elif deadline is not None and (not under_way or time.monotonic() > deadline):
                    return False
        finally:
            stream.close()
        return deadline is None

    def _take(self, outcome: Outcome) -> None:
        number = outcome.shard
        if outcome.status == "done" and outcome.record is not None:
            self._errors.pop(number, None)
            self._meters.add("ddpm_shards_done")
            self._meters.add("ddpm_shards_retried", int(outcome.record.times.attempt > 1))
            if number not in self._made:
                self._made.add(number)
                self._images_made += outcome.record.count
            self._harvest.add(number, outcome.record)
            data = comparable_training_data(self.spec, self.model.card.data)
            self._guard = check_guards(self._harvest.tally, self.config.guards, data)
        elif outcome.status == "failed":
            self._meters.add("ddpm_shards_failed")
            self._errors[number] = f"{outcome.error} (on {outcome.worker})"
        elif outcome.status == "guard":
            self._guard = outcome.error

    def _tick(self, under_way: list[ShardProgress]) -> None:
        inside = sum(unit.images for unit in under_way if unit.shard not in self._made)
        done = min(self.spec.count, self._images_before + self._images_made + inside)
        rate = (self._images_made + inside) / max(1e-9, time.monotonic() - self._began)
        notes = [f"{len(under_way)} shards under way"] + [f"{len(self._errors)} failed"] * bool(self._errors)
        notes += [f"beside {' and '.join(self._company)}"] * bool(self._company)
        self._progress(done, self.spec.count, ", ".join(notes))
        self._meters.gauge("ddpm_images_done", done)
        self._meters.gauge("ddpm_images_per_second", rate)
        self._meters.add_counted()
        self.diary.progress(done, rate, len(self._errors), len(under_way))
        self._say_if_quiet((self._images_made + inside, len(self._errors)), under_way)
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + beats.EVERY_SECONDS
            self._beat("running", under_way)

    def _say_if_quiet(self, heard: tuple[int, int], under_way: list[ShardProgress]) -> None:
        if heard != self._heard:
            self._heard = heard
            self._quiet.progress()
        elif (seconds := self._quiet.due()) is not None:
            _log.warning("%s", stall_reason(self.spec, seconds, under_way))

    def _publish(self) -> Status:
        manifest, sheet, report = publish_manifest(
            self.store, self.spec, self._harvest, self.model.card.class_names
        )
        self.diary.complete(manifest, sheet, report)
        self._progress(self.spec.count, self.spec.count, "complete")
        return "complete"

    def _beat(self, status: Status | Literal["running"], under_way: list[ShardProgress]) -> None:
        beat = beats.make_heartbeat(
            self._id,
            self.spec,
            status,
            began_at=self._began_at,
            images_made=self._images_made,
            under_way=under_way,
            failed={shard(self.spec, n).name: text for n, text in sorted(self._errors.items())},
        )
        try:
            beats.write_heartbeat(self.store, beat)
        except StoreUnreachable as error:
            _log.warning("no heartbeat: %s", error)  # the workers wait for the store, so the driver does too

    def _reason(self, status: Status) -> str | None:
        if status == "failed":
            return f"{len(self._errors)} shards failed" if self._errors else "the driver failed"
        return self._guard if status == "stopped by a guard" else None if status == "complete" else status

    def _result(self, status: Status) -> GenerationResult:
        return GenerationResult(
            status=status,
            output=self.config.output,
            spec_digest=self.spec.digest,
            count=self.spec.count,
            num_shards=num_shards(self.spec),
            shards_made=len(self._made),
            images_made=self._images_made,
            seconds=time.monotonic() - self._began,
            failed={shard(self.spec, n).key: text for n, text in sorted(self._errors.items())},
            reason=self._guard or self._lost,
            run_url=self.diary.url,
            company=self._company,
        )


def _introduced(beat: beats.Heartbeat) -> str:
    """A job as a person may find it."""
    return f"the job of {time.strftime('%F %T', time.gmtime(beat.began_at))}Z on {beat.host}"


def stall_reason(spec: Spec, quiet_seconds: float, under_way: Sequence[ShardProgress]) -> str:
    """A line for a generation without news."""
    if under_way:
        oldest = min(under_way, key=lambda unit: unit.began_at)
        name, age = shard(spec, oldest.shard).name, max(0.0, time.time() - oldest.began_at)
        what = f"{oldest.worker} is at {name} since {age:.0f} s: it samples, or waits for the store"
    else:
        what = "no shard is under way: Ray starts workers, or waits for room for them"
    return f"no news for {quiet_seconds:.0f} s: {what}"
