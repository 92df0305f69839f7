"""Heartbeats: each job's progress and the shards it has, stored beside its output; deleted when the generation is
complete.
"""

import logging
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.bounds import Count, Date, Name, Seconds, Sha256, Text
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.generate.coordinator import ShardProgress
from ddpm_pipeline.generate.layout import JOBS_PREFIX
from ddpm_pipeline.generate.plan import shard
from ddpm_pipeline.generate.spec import Spec, canonical
from ddpm_pipeline.store import ObjectMissing, Store, StoreUnreachable

_log = logging.getLogger(__name__)
EVERY_SECONDS = 2.0
STALE_AFTER_SECONDS = 60.0
MAX_ANNOUNCED = 10_000


class ShardInProgress(Settings):
    """A shard that a worker is sampling."""

    shard: Name
    """Name of the shard."""
    worker: Name
    """Host and process."""
    seconds: Seconds
    """Time since the worker began it."""
    images: Count
    """Samples finished so far."""


class Heartbeat(Settings):
    """Progress of one job at a prefix."""

    job: Name
    """Identifies the job."""
    spec_digest: Sha256
    """The generation it works on."""
    state: Name
    """`running`, or how the job ended: a value of GenerationResult.status."""
    host: Name
    """Where the job's driver runs."""
    began_at: Date
    """Seconds since 1970 (UTC)."""
    updated_at: Date
    """Seconds since 1970 (UTC)."""
    images_made: Count
    """Images in shards that this job has finished."""
    images_per_second: Annotated[float, Field(ge=0)]
    """Mean over the job's life."""
    under_way: tuple[ShardInProgress, ...]
    """Shards that its workers are sampling."""
    failed: dict[Name, Text]
    """Failed shards, with their last error; some may be retried."""
    announced: Annotated[tuple[Name, ...], Field(max_length=MAX_ANNOUNCED)] = ()
    """Shards that the job hands out next. None in heartbeats of earlier versions."""

    @property
    def label(self) -> str:
        """The job by its start and its host."""
        return f"the job of {time.strftime('%F %T', time.gmtime(self.began_at))}Z on {self.host}"

    @property
    def alive(self) -> bool:
        """Whether the job was running a minute ago or less."""
        return self.state == "running" and time.time() - self.updated_at < STALE_AFTER_SECONDS


def new_job_id() -> str:
    """A unique name; names sort by time."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}"


def make_heartbeat(
    job: str,
    spec: Spec,
    state: str,
    *,
    began_at: Date,
    images_made: int,
    in_progress: Sequence[ShardProgress],
    failed: dict[str, str],
    announced: Sequence[int] = (),
) -> Heartbeat:
    """The heartbeat of a job now."""
    now = time.time()
    units = [
        ShardInProgress(
            shard=shard(spec, unit.shard).name,
            worker=unit.worker,
            seconds=max(0.0, now - unit.began_at),
            images=unit.images,
        )
        for unit in in_progress
    ]
    return Heartbeat(
        job=job,
        spec_digest=spec.digest,
        state=state,
        host=socket.gethostname(),
        began_at=began_at,
        updated_at=now,
        images_made=images_made,
        images_per_second=images_made / max(1e-9, now - began_at),
        under_way=tuple(units),
        failed=failed,
        announced=tuple(shard(spec, number).name for number in announced),
    )


def write_heartbeat(store: Store, beat: Heartbeat) -> None:
    """Replace the job's heartbeat."""
    store.write(f"{JOBS_PREFIX}{beat.job}.json", canonical(beat.model_dump(mode="json")))


def read_heartbeats(store: Store) -> list[Heartbeat]:
    """Heartbeats of all jobs at the prefix, oldest first. Malformed ones are skipped with a warning."""
    return [beat for _, beat in _read_all(store) if isinstance(beat, Heartbeat)]


def read_heartbeats_by_key(store: Store) -> dict[str, Heartbeat | None]:
    """As `read_heartbeats`, by the keys of the objects: what one says of its job need not be true.

    None for those that could not be read this time.
    """
    return {key: beat if isinstance(beat, Heartbeat) else None for key, beat in _read_all(store)}


def clear_heartbeats(store: Store) -> None:
    """Delete the heartbeats of all jobs."""
    for info in list(store.list(JOBS_PREFIX)):
        store.delete(info.key)


def clear_ended(store: Store) -> None:
    """Delete the heartbeats of ended jobs, and malformed ones."""
    for key, beat in _read_all(store):
        if beat is None or (isinstance(beat, Heartbeat) and not beat.alive):
            store.delete(key)


def delete_heartbeat(store: Store, job: str) -> None:
    """Delete one job's heartbeat."""
    store.delete(f"{JOBS_PREFIX}{job}.json")


def _read_all(store: Store) -> Iterator[tuple[str, Heartbeat | StoreUnreachable | None]]:
    """Heartbeats by key; None for a malformed one, the error for one that is just being replaced."""
    for info in list(store.list(JOBS_PREFIX)):
        try:
            yield (
                info.key,
                parse_document(Heartbeat, store.read(info.key), f"{store.uri}/{info.key}", "a heartbeat"),
            )
        except ObjectMissing:
            continue  # its job has just deleted it
        except StoreUnreachable as error:
            yield info.key, error
        except DamageError as error:
            _log.warning("skipped: %s", error)
            yield info.key, None
