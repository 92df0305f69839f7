"""Status of a generation, read from its prefix alone: no job needs to run, and any machine can ask."""

from dataclasses import dataclass
from typing import Literal

from ddpm_pipeline.generate.completeness import Completeness, check_complete
from ddpm_pipeline.generate.done_records import DoneRecord
from ddpm_pipeline.generate.generation_cost import Cost, cost_of_generation
from ddpm_pipeline.generate.heartbeat import Heartbeat, read_heartbeats
from ddpm_pipeline.generate.prefix_spec import open_generation
from ddpm_pipeline.generate.spec import Spec
from ddpm_pipeline.generate.stored_generation import Generation, PrefixListing

_RECORDS_READ = 32
State = Literal["complete", "running", "not complete", "damaged"]


@dataclass(frozen=True)
class GenerationStatus:
    """Status of a generation."""

    output: str
    state: State
    """`not complete`: no job has sent a heartbeat lately; the same generate command continues. `damaged`: something
    contradicts the manifest; the same generate command repairs it."""
    spec: Spec
    num_shards: int
    shards_done: int
    images_done: int
    shards_under_way: int
    failed: dict[str, str]
    """Failed shards, with their last error; some may be retried."""
    images_per_second: float | None
    """Sum over the running jobs; without any, the mean rate between done-records. None if unknown."""
    eta_seconds: float | None
    """Time left at that rate; None if unknown or if no job runs."""
    jobs: tuple[Heartbeat, ...]
    """Heartbeats of all jobs."""
    faults: tuple[str, ...] = ()
    """What contradicts the manifest; the first of `num_faults` findings."""
    num_faults: int = 0
    cost: Cost | None = None
    """Cost of a complete generation; None otherwise."""


def generation_status(uri: str) -> GenerationStatus:
    """Status of the generation at a prefix. UserError where there is none."""
    generation = open_generation(uri)
    spec = generation.spec
    proof = check_complete(generation)
    listing = proof.listing or generation.listing(objects=False)
    missing = [generation.shard(number) for number in listing.missing()]
    images_done = spec.count - sum(unit.count for unit in missing)
    jobs = tuple(read_heartbeats(generation.store))
    alive = [job for job in jobs if job.alive]
    if alive:
        speed: float | None = sum(job.images_per_second for job in alive) or None
    else:
        speed = _recorded_speed(generation, listing)
    left = spec.count - images_done
    missing_names = {unit.name for unit in missing}
    return GenerationStatus(
        output=uri,
        state=_state(proof, bool(alive)),
        spec=spec,
        num_shards=generation.num_shards,
        shards_done=generation.num_shards - len(missing),
        images_done=images_done,
        shards_under_way=sum(len(job.under_way) for job in alive),
        failed={name: error for job in jobs for name, error in job.failed.items() if name in missing_names},
        images_per_second=speed,
        eta_seconds=left / speed if alive and speed else None,
        jobs=jobs,
        faults=tuple(proof.faults),
        num_faults=proof.num_faults,
        cost=cost_of_generation(proof.manifest) if proof.complete and proof.manifest is not None else None,
    )


def _state(proof: Completeness, alive: bool) -> State:
    if proof.complete:
        return "complete"
    return "running" if alive else "damaged" if proof.num_faults else "not complete"


def _recorded_speed(generation: Generation, listing: PrefixListing) -> float | None:
    """Images per second between the first and the last of a few records spread over the plan."""
    done = listing.done()
    if len(done) < 2:
        return None
    stride = max(1, (len(done) - 1) // (_RECORDS_READ - 1))
    times: list[float] = []
    for _, record in generation.read_records(sorted({*done[::stride], done[-1]})):
        if isinstance(record, DoneRecord):  # an unusable one is the business of `ddpm verify`
            times.append(record.times.finished_at)
    span = max(times, default=0.0) - min(times, default=0.0)
    images = sum(generation.shard(number).count for number in done)
    return images / span if span > 0 else None
