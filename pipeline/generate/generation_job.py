"""A generation under way: hands out shards, retries, shares with other jobs, and publishes the manifest."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ddpm_pipeline.cluster import NodeReport, grows
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.generate.coordinator import ShardProgress
from ddpm_pipeline.generate.done_records import RecordAggregate, short_tag
from ddpm_pipeline.generate.efficiency import Efficiency, EfficiencyCalculator
from ddpm_pipeline.generate.finalize import ModelFacts, Superseded, publish_manifest, require_newest
from ddpm_pipeline.generate.generation_cost import Cost, cost_of_records
from ddpm_pipeline.generate.guards import check_guards
from ddpm_pipeline.generate.heartbeat import EVERY_SECONDS
from ddpm_pipeline.generate.job_reporter import JobCounts, JobReporter, Status
from ddpm_pipeline.generate.model_source import ResolvedModel
from ddpm_pipeline.generate.pool_kinds import selector_of
from ddpm_pipeline.generate.ray_pool import OutcomeStream, WorkerPool, start_pool
from ddpm_pipeline.generate.sample_worker import Outcome, SampleWorkerConfig
from ddpm_pipeline.generate.shard_writer import comparable_training_data
from ddpm_pipeline.generate.sharing import Handout, OtherJobs
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.signatures import SigningKey
from ddpm_pipeline.store import StoreUnreachable, retry_during_outage

_log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
_DRAIN_MARGIN_SECONDS = 5.0


@dataclass(frozen=True)
class GenerationResult:
    """How a generation ended."""

    status: Status
    """`drained`: ended on request, continues with the same command; `superseded`: another job raised the count."""
    output: str
    spec_digest: str
    count: int
    num_shards: int
    shards_made: int
    """By this job."""
    images_made: int
    """By this job."""
    seconds: float
    """Duration of the job."""
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """Failed shards, with the last error of each."""
    reason: str | None = None
    """The guard's message, or which job superseded this one."""
    run_url: str | None = None
    concurrent_jobs: tuple[str, ...] = ()
    """Other jobs of the same generation that were running at the same time, and shared the work."""
    shards_made_twice: int = 0
    """Shards that another job finished while this one sampled them: its work on them was for nothing."""
    efficiency: Efficiency | None = None
    """How well GPUs were used; None on CPUs."""
    signature: str | None = None
    """How a complete generation is signed, or why not; None where no key is configured."""
    cost: Cost | None = None
    """Cost of the finished shards, by their done-records; None where none was read."""

    @property
    def images_per_second(self) -> float:
        """Mean over the job, including its start and end."""
        return self.images_made / self.seconds if self.seconds > 0 else 0.0


def pause(stop: threading.Event, seconds: float) -> bool:
    """Wait; whether the job is to stop."""
    return stop.wait(seconds)


class GenerationJob:
    """Hands out missing shards until none is left, then publishes the manifest."""

    def __init__(
        self,
        config: GenerateConfig,
        generation: Generation,
        model: ResolvedModel,
        reporter: JobReporter,
        stop: threading.Event,
        began: float,
        nodes: Sequence[NodeReport] = (),
        signer: SigningKey | None = None,
    ) -> None:
        """`began`: time.monotonic() at the job's start; `nodes`: what those with GPUs have answered."""
        self._config = config
        self._generation = generation
        self._model = model
        self._reporter = reporter
        self._stop = stop
        self._began = began
        self._counts = JobCounts()
        self._records = RecordAggregate()
        self._efficiency_calculator = EfficiencyCalculator(generation.spec, model.card)
        self._facts = ModelFacts(
            model.card.class_names, self._efficiency_calculator.evaluations_per_image, config.cost, signer
        )
        self._guard: str | None = None
        self._superseded: str | None = None
        self._nodes = nodes
        self._unfit: dict[str, str] = {}
        self._others = OtherJobs(generation, reporter.job)
        self._tally: Counter[str] = Counter()  # outcomes of a round, by status
        self._images_elsewhere = 0  # that other jobs had made when the missing shards were counted

    def run(self) -> GenerationResult:
        """Work until the generation is complete, or the job is drained, superseded, stopped, or out of attempts."""
        status: Status = "failed"
        try:
            self._reporter.start(self._counts)
            try:
                status = self._work()
            except Superseded as superseded:
                status, self._superseded = "superseded", str(superseded)
            return self._result(status)
        finally:
            self._reporter.end(status, self._counts, self._reason(status))

    def _work(self) -> Status:
        pool: WorkerPool | None = None
        attempts = 0
        while attempts < self._config.max_attempts:
            retry_during_outage(lambda: require_newest(self._generation, self._facts))
            self._look_at_others()  # first, so that what they finish meanwhile is not missing
            missing = retry_during_outage(self._missing)
            if not missing:
                return retry_during_outage(self._publish)
            held = self._others.held()
            free = [number for number in missing if number not in held]
            if not free:
                if not self._wait_for_others(missing):
                    return "drained"
                continue
            pool = pool or self._start_pool()
            num_unfit, self._tally = len(self._unfit), Counter()
            if not self._try_each(pool, free):
                return "drained" if self._guard is None else "stopped by a guard"
            shared = bool(held) or self._tally["elsewhere"] > 0
            if len(self._unfit) == num_unfit:
                # A round that only leaves shards to other jobs is no attempt at them.
                attempts += self._tally["failed"] > 0 or not shared
            elif not self._has_fit_nodes():
                return "failed"
            else:  # what the unfit workers gave back was not attempted; the next ones are placed elsewhere
                pool = replace(pool, selector=self._selector())
        return "failed" if retry_during_outage(self._missing) else retry_during_outage(self._publish)

    def _start_pool(self) -> WorkerPool:
        config = SampleWorkerConfig(
            self._generation.spec,
            self._model.card,
            self._config.output,
            self._config.guards,
            self._config.max_attempts,
            self._config.features,
        )
        return start_pool(config, self._model.weights, self._selector())

    def _selector(self) -> dict[str, str]:
        """Where workers are placed: on no node whose GPUs are known to be unfit or of another kind."""
        fit = selector_of(self._generation.spec.device_kind, self._nodes, self._unfit)
        return {**fit, **self._config.node_labels}

    def _has_fit_nodes(self) -> bool:
        """Whether a worker may still be placed somewhere, or on a node that the cluster adds."""
        if grows():
            return True
        kind = self._generation.spec.device_kind
        return any(found.is_fit(kind) and found.node_id not in self._unfit for found in self._nodes)

    def _missing(self) -> list[int]:
        """Shards that are not done: by the list of records, and once none is missing there, by objects and records."""
        missing = self._generation.listing(objects=False).missing() or self._unusable()
        done = self._generation.spec.count - sum(self._generation.shard(number).count for number in missing)
        self._counts.images_before = done - self._counts.images_made
        known = set(missing) if self._counts.errors else set[int]()
        self._counts.errors = {
            number: text for number, text in self._counts.errors.items() if number in known
        }
        self._counts.images_elsewhere, self._images_elsewhere = 0, self._others.images_made()
        return missing

    def _unusable(self) -> list[int]:
        """Shards that have a record but no intact object, or no valid record. Workers detect and replace both.

        No record is deleted: another job may have replaced it by now, and completed the generation with it.
        """
        listing = self._generation.listing()
        unusable = [(number, "its object is missing") for number in listing.missing()]
        unusable += self._generation.add_records(listing, self._records)
        for number, reason in unusable:
            self._counts.errors[number] = reason
            self._counts.made.discard(number)
        if unusable:
            self._records = RecordAggregate()  # sums cannot be subtracted, so all records are read again
        return sorted(number for number, _ in unusable)

    def _try_each(self, pool: WorkerPool, free: list[int]) -> bool:
        """Try each of the missing shards that no other job has once.

        False if the job is to end: drained, or stopped by a guard.
        """
        workers = self._config.max_workers or self._config.num_workers
        handout = Handout(self._generation, self._others, free, workers)
        self._exchange(pool, handout, [])
        outcomes = OutcomeStream(self._config, pool, handout.numbers, handout.remaining)
        deadline: float | None = None
        try:
            while (arrived := outcomes.poll(TICK_SECONDS)) is not None:
                for outcome in arrived:
                    self._take(outcome)
                in_progress = pool.in_progress()
                handout.begin(outcome.shard for outcome in arrived)
                handout.begin(unit.shard for unit in in_progress)
                self._report(in_progress)
                if handout.is_due():
                    self._exchange(pool, handout, in_progress)
                if self._guard is not None:
                    pool.drain(0)
                    return False
                if self._stop.is_set() and deadline is None:
                    pool.drain(self._config.drain_seconds)
                    deadline = time.monotonic() + self._config.drain_seconds + _DRAIN_MARGIN_SECONDS
                elif deadline is not None and (not in_progress or time.monotonic() > deadline):
                    return False
        finally:
            outcomes.close()
        return deadline is None

    def _exchange(self, pool: WorkerPool, handout: Handout, in_progress: Sequence[ShardProgress]) -> None:
        """Tell other jobs what this one has in hand and hands out next, and leave to them what is theirs."""
        try:
            handout.look()
            announced = [] if self._stop.is_set() else handout.announce()
            self._reporter.write_heartbeat("running", self._counts, in_progress, announced)
            if self._others.live():
                handout.look()  # again: one may have announced the same meanwhile
        except StoreUnreachable as error:
            _log.warning("other jobs are not seen: %s", error)
        self._counts.images_elsewhere = self._others.images_made() - self._images_elsewhere
        pool.leave(handout.left)

    def _look_at_others(self) -> None:
        try:
            self._others.look()
        except StoreUnreachable as error:
            _log.warning("other jobs are not seen: %s", error)

    def _wait_for_others(self, missing: list[int]) -> bool:
        """Wait until other jobs, which have all missing shards, have finished or given up one. False to end the job."""
        while self._others.held().issuperset(missing):
            self._reporter.write_heartbeat("running", self._counts)
            self._report([], waits_for=len(missing))
            if pause(self._stop, EVERY_SECONDS):
                return False
            self._look_at_others()
            self._counts.images_elsewhere = self._others.images_made() - self._images_elsewhere
        return True

    def _report(self, in_progress: Sequence[ShardProgress], waits_for: int = 0) -> None:
        others = [beat.label for beat in self._others.live()]
        self._reporter.report(self._counts, in_progress, self._efficiency(), self._cost(), others, waits_for)

    def _take(self, outcome: Outcome) -> None:
        counts, number = self._counts, outcome.shard
        self._reporter.count(outcome)
        self._tally[outcome.status] += 1
        counts.made_twice += outcome.made_twice
        if outcome.status == "done" and outcome.record is not None:
            counts.errors.pop(number, None)
            if outcome.record_tag is not None and number not in counts.made:
                counts.made.add(number)
                counts.images_made += outcome.record.count
            self._records.add(number, outcome.record, short_tag(outcome.record_tag))
            data = comparable_training_data(self._generation.spec, self._model.card.data)
            self._guard = check_guards(self._records.stats, self._config.guards, data)
        elif outcome.status == "failed":
            counts.errors[number] = f"{outcome.error} (on {outcome.worker})"
        elif outcome.status == "unfit" and outcome.node is not None:
            self._unfit.setdefault(outcome.node, f"{outcome.error} (on {outcome.worker})")
        elif outcome.status == "guard":
            self._guard = outcome.error

    def _publish(self) -> Status:
        published = publish_manifest(self._generation, self._records, self._facts)
        self._reporter.complete(*published, self._efficiency(), self._cost())
        return "complete"

    def _reason(self, status: Status) -> str | None:
        if status == "failed" and self._unfit and not self._counts.errors:
            return next(iter(self._unfit.values()))
        if status == "failed":
            return f"{len(self._counts.errors)} shards failed" if self._counts.errors else "the driver failed"
        return self._guard if status == "stopped by a guard" else None if status == "complete" else status

    def _result(self, status: Status) -> GenerationResult:
        generation, counts, signer = self._generation, self._counts, self._facts.signer
        return GenerationResult(
            status=status,
            output=self._config.output,
            spec_digest=generation.spec.digest,
            count=generation.spec.count,
            num_shards=generation.num_shards,
            shards_made=len(counts.made),
            images_made=counts.images_made,
            seconds=time.monotonic() - self._began,
            failed={generation.shard(number).key: text for number, text in sorted(counts.errors.items())},
            reason=self._guard or self._superseded or (self._reason(status) if self._unfit else None),
            run_url=self._reporter.run_url,
            concurrent_jobs=tuple(self._others.met.values()),
            shards_made_twice=counts.made_twice,
            efficiency=self._efficiency(),
            cost=self._cost(),
            signature=f"by key {signer.public.key_id}" if signer and status == "complete" else None,
        )

    def _efficiency(self) -> Efficiency | None:
        return self._efficiency_calculator.of(self._records.gpus)

    def _cost(self) -> Cost | None:
        return cost_of_records(self._records, self._facts.evaluations_per_image, self._facts.price)
