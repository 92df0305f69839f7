"""How a generation stands, from its prefix alone: no job need run, and any machine may ask."""

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import DamageError, UserError
from pipeline.generate.completeness import Completeness, check_complete
from pipeline.generate.done_records import read_record
from pipeline.generate.heartbeat import Heartbeat, read_heartbeats
from pipeline.generate.layout import SPEC_KEY
from pipeline.generate.listing import PrefixListing, list_prefix
from pipeline.generate.plan import num_shards, shard
from pipeline.generate.proven_count import proven_spec
from pipeline.generate.spec import Spec
from pipeline.store import ObjectMissing, Store, open_store

_RECORDS_READ = 32
State = Literal["complete", "running", "not complete", "damaged"]


@dataclass(frozen=True)
class GenerationStatus:
    """How a generation stands."""

    output: str
    state: State
    """`not complete`: no job has given a sign of life lately; run the same command to go on. `damaged`: there is a
    manifest, and something contradicts it; the same command makes that anew."""
    spec: Spec
    num_shards: int
    shards_done: int
    images_done: int
    shards_under_way: int
    failed: dict[str, str]
    """Shards given up or to be tried again, with the last error of each."""
    images_per_second: float | None
    """Of the running jobs together; else, from done-records, the mean while they were written. None: unknown."""
    eta_seconds: float | None
    """Time left at that speed; None when unknown or when no job runs."""
    jobs: tuple[Heartbeat, ...]
    """All jobs that have left a word."""
    faults: tuple[str, ...] = ()
    """What contradicts the manifest; the first of `num_faults`."""
    num_faults: int = 0


def generation_status(uri: str) -> GenerationStatus:
    """Status of the generation at a prefix. UserError where there is none."""
    store = open_store(uri)
    store.require_container()
    spec = proven_spec(store)
    if spec is None:
        raise UserError(f"{uri}: no {SPEC_KEY} there, so no generation; check the prefix")
    proof = check_complete(store, spec)
    found = proof.listed or list_prefix(store, spec, objects=False)
    missing = found.missing()
    images_done = spec.count - sum(shard(spec, number).count for number in missing)
    jobs = tuple(read_heartbeats(store))
    alive = [job for job in jobs if job.alive]
    if alive:
        speed: float | None = sum(job.images_per_second for job in alive) or None
    else:
        speed = _recorded_speed(store, spec, found)
    left = spec.count - images_done
    waiting = {shard(spec, number).name for number in missing}
    return GenerationStatus(
        output=uri,
        state=_state(proof, bool(alive)),
        spec=spec,
        num_shards=num_shards(spec),
        shards_done=num_shards(spec) - len(missing),
        images_done=images_done,
        shards_under_way=sum(len(job.under_way) for job in alive),
        failed={name: error for job in jobs for name, error in job.failed.items() if name in waiting},
        images_per_second=speed,
        eta_seconds=left / speed if alive and speed else None,
        jobs=jobs,
        faults=tuple(proof.faults),
        num_faults=proof.num_faults,
    )


def _state(proof: Completeness, alive: bool) -> State:
    if proof.complete:
        return "complete"
    return "running" if alive else "damaged" if proof.num_faults else "not complete"


def _recorded_speed(store: Store, spec: Spec, found: PrefixListing) -> float | None:
    """Images a second between the first and the last of a few records spread over the plan."""
    done = [number for number in range(len(found.sizes)) if found.is_done(number)]
    if len(done) < 2:
        return None
    stride = max(1, (len(done) - 1) // (_RECORDS_READ - 1))
    times: list[float] = []
    for number in {*done[::stride], done[-1]}:
        try:
            times.append(read_record(store, spec, shard(spec, number)).times.finished_at)
        except (DamageError, ObjectMissing):
            continue  # verification is what names it
    span = max(times, default=0.0) - min(times, default=0.0)
    images = sum(shard(spec, number).count for number in done)
    return images / span if span > 0 else None
