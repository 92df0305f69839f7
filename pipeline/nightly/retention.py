"""Retention: which nights lose their samples, and how. Deletes only what a record names, after checking it again."""

import datetime as dt
import logging
from collections.abc import Sequence

from ddpm_pipeline.config.nights import NightlyConfig
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.evaluate.document import evaluation_location, neighbours_location
from ddpm_pipeline.generate.heartbeat import read_heartbeats
from ddpm_pipeline.generate.layout import (
    CLAIM_PREFIX,
    CONTACT_KEY,
    DONE_PREFIX,
    JOBS_PREFIX,
    MANIFEST_KEY,
    REPORT_KEY,
    SHARD_PREFIX,
    SPEC_KEY,
)
from ddpm_pipeline.generate.manifest import read_manifest
from ddpm_pipeline.generate.spec import read_spec
from ddpm_pipeline.nightly.history import (
    Night,
    newest,
    night_prefix,
    read_latest,
    read_night,
    read_nights,
    write_night,
)
from ddpm_pipeline.store import Store, open_store
from ddpm_pipeline.telemetry.terminal import echo

_log = logging.getLogger(__name__)

_OBJECTS = {SPEC_KEY, CONTACT_KEY, REPORT_KEY}
_FOLDERS = (SHARD_PREFIX, DONE_PREFIX, CLAIM_PREFIX, JOBS_PREFIX)


def apply_retention(config: NightlyConfig, store: Store, previous: dt.date | None, today: dt.date) -> None:
    """Delete the samples of nights beyond `keep_nights` and `keep_days`. `previous` is the newest night when the job
    began; None without one, and where the dates were given by hand.

    A clock alone never deletes: ages count up to the day after `previous`, and after a gap of more nights than are
    caught up nothing is deleted until the next night.
    """
    if previous is not None and (today - previous).days > config.catch_up_nights:
        if config.keep_nights is not None or config.keep_days is not None:
            echo(
                f"retention is postponed to the next night: the one before was {previous}, and today is {today}"
            )
        return
    age_until = today if previous is None else min(today, previous + dt.timedelta(days=1))
    nights = read_nights(store)
    last, latest = newest(nights, today), read_latest(store)
    # Consumers read the night that latest.json names, until it names another one.
    protected = {night.date for night in (last, latest) if night is not None}
    by_age = select_for_retention(nights, age_until, None, config.keep_days)
    by_number = select_for_retention(nights, today, config.keep_nights, None)
    for night in {night.date: night for night in by_number + by_age}.values():
        if night.date not in protected:
            _delete(config.generate.output, store, night)


def select_for_retention(
    nights: Sequence[Night], today: dt.date, keep_nights: int | None, keep_days: int | None
) -> list[Night]:
    """Nights to lose their samples: those beyond the newest `keep_nights`, or older than `keep_days`, newest first.

    Nights dated after `today` are neither counted nor selected.
    """
    existing = [night for night in nights if not night.deleted and night.date <= today]
    existing.sort(key=lambda night: night.date, reverse=True)
    return [
        night
        for place, night in enumerate(existing)
        if (keep_nights is not None and place >= keep_nights)
        or (keep_days is not None and (today - night.date).days > keep_days)
    ]


def _delete(output: str, store: Store, night: Night) -> None:
    """Delete a night's samples, unless a second check finds that they are not the ones on record."""
    prefix = night_prefix(output, night.date)
    samples = open_store(prefix)
    reason = _reason_to_keep(store, samples, night)
    if reason is not None:
        _log.warning("%s: retention keeps its samples: %s", night.date, reason)
        return
    samples.delete(MANIFEST_KEY)  # first: without its manifest a generation counts as incomplete
    num_left = 0
    for info in list(samples.list()):
        if info.key in _OBJECTS or info.key.startswith(_FOLDERS):
            samples.delete(info.key)
        else:
            num_left += 1
    for parent, name in (evaluation_location(prefix), neighbours_location(prefix)):
        open_store(parent).delete(name)
    write_night(store, night.model_copy(update={"deleted": True}))
    echo(
        f"{night.date}: samples deleted by retention"
        + (f"; {num_left} other objects remain" if num_left else "")
    )


def _reason_to_keep(store: Store, samples: Store, night: Night) -> str | None:
    """Why a night's samples must stay, by its record, its generation and running jobs as they are now; or None."""
    if open_store(night.prefix).uri != samples.uri:
        return f"its record names another prefix ({night.prefix})"
    if read_night(store, night.date) != night:
        return "its record has been replaced"
    latest = read_latest(store)
    if latest is not None and latest.date == night.date:
        return "latest.json names it"
    if any(beat.alive for beat in read_heartbeats(samples)):
        return "a job is running there"
    try:
        spec, manifest = read_spec(samples), read_manifest(samples)
    except DamageError as error:
        return f"{error}"
    digests = {
        spec.digest if spec else night.spec_digest,
        manifest.spec_digest if manifest else night.spec_digest,
    }
    return (
        None
        if digests == {night.spec_digest}
        else "its prefix holds another generation than its record names"
    )
