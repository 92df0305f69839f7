"""The history of nights: a record for each, drift against earlier ones, and the dates that are pending.

`latest.json` is a copy of the newest record. It follows the records: a job that finds it behind moves it forward.
"""

import datetime as dt
import logging
import re
import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.config.nights import DriftConfig
from ddpm_pipeline.errors import DamageError, JobError, UserError
from ddpm_pipeline.evaluate.document import Evaluation
from ddpm_pipeline.generate.generation_cost import Cost
from ddpm_pipeline.store import ObjectMissing, Store

_log = logging.getLogger(__name__)

LATEST_KEY = "latest.json"
PAGE_KEY = "index.html"
MAX_CLOCK_DIFFERENCE_SECONDS = 3600.0
"""Largest difference between this machine's clock and the store's with which a night starts."""
MAX_DAYS_MISSED = 60
"""After more days since the newest night, the clock alone is not trusted: dates must be given."""
_HISTORY = "history/"
_RECORD = re.compile(r"history/\d{4}-\d\d-\d\d\.json")
_MIN_NIGHTS = 3
_MAX_ATTEMPTS = 20


class Night(Settings):
    """The record of one night, complete and evaluated."""

    format: Literal[1] = 1
    """Version of this document's layout."""
    date: dt.date
    """Names the night."""
    prefix: str = Field(max_length=2048)
    """Where its samples are, or were."""
    spec_digest: str = Field(max_length=128)
    """Names its generation."""
    model: str = Field(max_length=512)
    """`name/version`."""
    count: int = Field(ge=1, lt=2**53)
    """Samples."""
    images_per_second: float = Field(ge=0, allow_inf_nan=False)
    """Samples over the device time of all workers."""
    cost: Cost | None = Field(default=None, exclude_if=lambda cost: cost is None)
    """What they cost, at the price of that night; None in records of versions that did not state it."""
    evaluation: Evaluation
    """Its metrics."""
    drift: tuple[str, ...] = Field(max_length=100)
    """A line for each metric that differs from the nights before; empty without drift."""
    deleted: bool = False
    """Whether retention has deleted the samples."""


def night_prefix(output: str, date: dt.date) -> str:
    """The prefix of a night's samples."""
    return f"{output.rstrip('/')}/date={date.isoformat()}"


def night_seed(seed: int, date: dt.date) -> int:
    """A seed for each night: the seed of the settings, then the digits of the date."""
    return seed * 10**8 + int(date.strftime("%Y%m%d"))


def write_night(store: Store, night: Night) -> None:
    """Write a night's record."""
    store.write(_key(night.date), (night.model_dump_json(indent=2) + "\n").encode())


def read_night(store: Store, date: dt.date) -> Night | None:
    """A night's record, or None; a warning where it cannot be used."""
    return _read(store, _key(date), "the night is evaluated and recorded again")


def read_latest(store: Store) -> Night | None:
    """The night that latest.json names, or None; a warning where it cannot be used."""
    return _read(store, LATEST_KEY, "it is written again")


def write_latest(store: Store, night: Night) -> None:
    """Make latest.json name a night, whatever it named before; see `advance_latest`."""
    store.write(LATEST_KEY, (night.model_dump_json(indent=2) + "\n").encode())


def read_nights(store: Store) -> list[Night]:
    """All nights, oldest first; a warning for each record that cannot be used."""
    found: list[Night] = []
    for info in store.list(_HISTORY):
        if _RECORD.fullmatch(info.key):
            date = info.key.removeprefix(_HISTORY).removesuffix(".json")
            night = _read(
                store, info.key, f"it is ignored; to make it again: ddpm nightly --from {date} --to {date}"
            )
            found += [night] if night is not None else []
    return found


def newest(nights: Sequence[Night], today: dt.date) -> Night | None:
    """The newest night that still has its samples and is not dated in the future."""
    existing = [night for night in nights if not night.deleted and night.date <= today]
    return max(existing, key=lambda night: night.date, default=None)


def advance_latest(store: Store, today: dt.date) -> Night | None:
    """Make latest.json name the newest night on record; returns the night that it names then.

    Several jobs may do so at once, and one may be delayed just before it writes. So each reads again after it wrote,
    and returns only when latest.json is not behind the records. JobError when other jobs keep rewriting it.
    """
    for _ in range(_MAX_ATTEMPTS):
        night = newest(read_nights(store), today)
        latest = read_latest(store)  # last, to leave other jobs little time to write it
        ahead = latest is not None and latest.date > today
        if ahead and latest is not None:
            _log.warning("latest.json named %s, which lies in the future (today is %s)", latest.date, today)
        if night is None or (latest is not None and not ahead and _is_current(latest, night)):
            return latest
        write_latest(store, night)
    raise JobError(f"{store.uri}/{LATEST_KEY}: other jobs keep rewriting it; run this again")


def today_by(store: Store, now: dt.datetime) -> dt.date:
    """Today's date (UTC). UserError unless this machine's clock (`now`) and the store's agree.

    Nights are named by dates and retention counts them, so one wrong clock must not decide either.
    """
    server_time = store.server_time()
    if server_time is None:
        return now.date()
    if abs((now - server_time).total_seconds()) > MAX_CLOCK_DIFFERENCE_SECONDS:
        raise UserError(
            f"clock: this machine says {now:%F %T}Z and {store.uri} says {server_time:%F %T}Z; set the wrong one "
            "(NTP), then run this again: no night is made or deleted by a clock alone"
        )
    return server_time.date()


def drift(evaluation: Evaluation, earlier: Sequence[Night], config: DriftConfig) -> tuple[str, ...]:
    """A line for each metric that differs from the trailing nights evaluated under the same conditions."""
    trailing = [n.evaluation for n in earlier if n.evaluation.terms == evaluation.terms][-config.nights :]
    if len(trailing) < _MIN_NIGHTS:
        return ()
    lines: list[str] = []
    for name in config.metrics:
        values = [other[name] for other in trailing if name in other.metrics]
        if name not in evaluation.metrics or len(values) < _MIN_NIGHTS:
            continue
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        change = evaluation[name] - mean
        if abs(change) > max(config.max_deviations * deviation, config.min_share * abs(mean)):
            lines.append(
                f"{name} is {evaluation[name]:.4g}, the {len(values)} nights before {mean:.4g} ± {deviation:.2g}"
            )
    return tuple(lines)


def pending_dates(
    latest: dt.date | None, today: dt.date, first: dt.date | None, last: dt.date | None, max_nights: int
) -> list[dt.date]:
    """The nights from `first` to `last` if given, else those after `latest` up to today, at most `max_nights`.

    UserError for a date in the future, and without dates when more than MAX_DAYS_MISSED days were missed.
    """
    for flag, date in (("--from", first), ("--to", last)):
        if date is not None and date > today:
            raise UserError(
                f"{flag}: {date} lies in the future (today is {today} UTC); name a night up to today"
            )
    if first is None and last is None:
        if latest is not None and (today - latest).days > MAX_DAYS_MISSED:
            raise UserError(
                f"nightly: the newest night is {latest}, and the clock says {today}, {(today - latest).days} days "
                f"later; if that is right, name the nights once: --from {today}"
            )
        begin = today if latest is None else min(today, latest + dt.timedelta(days=1))
        begin = max(begin, today - dt.timedelta(days=max_nights - 1))
        end = today
    else:
        end = last or today
        begin = first or end
    return [begin + dt.timedelta(days=n) for n in range((end - begin).days + 1)]


def _is_current(latest: Night, night: Night) -> bool:
    """Whether latest.json equals the newest record, or names a newer night whose record is gone."""
    return latest == night or latest.date > night.date


def _key(date: dt.date) -> str:
    return f"{_HISTORY}{date.isoformat()}.json"


def _read(store: Store, key: str, consequence: str) -> Night | None:
    """A record, or None; a warning with the consequence for one that is damaged or names another night."""
    try:
        night = parse_document(Night, store.read(key), f"{store.uri}/{key}", "a night's record")
    except ObjectMissing:
        return None
    except DamageError as error:
        _log.warning("%s: %s", error, consequence)
        return None
    if key not in (LATEST_KEY, _key(night.date)):
        _log.warning("%s/%s: holds the record of %s: %s", store.uri, key, night.date, consequence)
        return None
    return night
