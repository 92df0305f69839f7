"""Retention of the nights: which samples go, and how they go. Only what a record names, and only after another look."""

import datetime as dt
import logging

from pipeline.config.nights import NightlyConfig
from pipeline.errors import DamageError
from pipeline.evaluate.document import evaluation_location
from pipeline.generate.heartbeat import read_heartbeats
from pipeline.generate.layout import (
    CLAIM_PREFIX,
    CONTACT_KEY,
    DONE_PREFIX,
    JOBS_PREFIX,
    MANIFEST_KEY,
    REPORT_KEY,
    SHARD_PREFIX,
    SPEC_KEY,
)
from pipeline.generate.manifest import read_manifest
from pipeline.generate.spec import read_spec
from pipeline.nightly.history import (
    Night,
    expired,
    newest,
    night_prefix,
    read_latest,
    read_night,
    read_nights,
    write_night,
)
from pipeline.store import Store, open_store
from pipeline.telemetry.terminal import echo

_log = logging.getLogger(__name__)

_OBJECTS = {SPEC_KEY, CONTACT_KEY, REPORT_KEY}
_FOLDERS = (SHARD_PREFIX, DONE_PREFIX, CLAIM_PREFIX, JOBS_PREFIX)


def retain(config: NightlyConfig, store: Store, before: dt.date | None, today: dt.date) -> None:
    """Delete the samples of expired nights. `before` is the newest night that was there when the job began; None where
    there was none, or where the dates were told by hand.

    No clock alone deletes: a night's age counts to the day after `before`, at most, and after a gap of more nights than
    are caught up nothing is deleted until the next night.
    """
    if before is not None and (today - before).days > config.catch_up_nights:
        if config.keep_nights is not None or config.keep_days is not None:
            echo(
                f"retention waits for the next night: the one before was {before}, and the clock says {today}"
            )
        return
    counted = today if before is None else min(today, before + dt.timedelta(days=1))
    nights = read_nights(store)
    last, latest = newest(nights, today), read_latest(store)
    # What consumers read now stays until latest.json names another night.
    spared = {night.date for night in (last, latest) if night is not None}
    by_age = expired(nights, None, counted, None, config.keep_days)
    by_number = expired(nights, None, today, config.keep_nights, None)
    for night in {night.date: night for night in by_number + by_age}.values():
        if night.date not in spared:
            _delete(config.generate.output, store, night)


def _delete(output: str, store: Store, night: Night) -> None:
    """Delete a night's samples unless a second look tells that they are not the ones on record."""
    prefix = night_prefix(output, night.date)
    samples = open_store(prefix)
    reason = _kept_because(store, samples, night)
    if reason is not None:
        _log.warning("%s: its samples are left alone by retention: %s", night.date, reason)
        return
    samples.delete(MANIFEST_KEY)  # first: a generation without manifest is no complete one
    left = 0
    for info in list(samples.list()):
        if info.key in _OBJECTS or info.key.startswith(_FOLDERS):
            samples.delete(info.key)
        else:
            left += 1
    parent, name = evaluation_location(prefix)
    open_store(parent).delete(name)
    write_night(store, night.model_copy(update={"deleted": True}))
    echo(f"{night.date}: samples deleted by retention" + (f"; {left} other objects are left" if left else ""))


def _kept_because(store: Store, samples: Store, night: Night) -> str | None:
    """Why a night's samples must stay, by its record, its generation and the jobs there as they are now; or None."""
    if open_store(night.prefix).uri != samples.uri:
        return f"its record names another place ({night.prefix})"
    if read_night(store, night.date) != night:
        return "its record was replaced meanwhile"
    latest = read_latest(store)
    if latest is not None and latest.date == night.date:
        return "latest.json names it"
    if any(beat.alive for beat in read_heartbeats(samples)):
        return "a job is at work there"
    try:
        spec, manifest = read_spec(samples), read_manifest(samples)
    except DamageError as error:
        return f"{error}"
    found = {
        spec.digest if spec else night.spec_digest,
        manifest.spec_digest if manifest else night.spec_digest,
    }
    return None if found == {night.spec_digest} else "another generation is there than its record names"
