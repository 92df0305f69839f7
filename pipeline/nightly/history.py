"""The nights so far: a record each, what they say about drift, and which samples may be deleted.

`latest.json` follows the records: it is a copy of the newest one, and whoever finds it behind moves it forward.
"""

import datetime as dt
import logging
import re
import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from pipeline.config.base import Settings
from pipeline.config.json_document import parse_document
from pipeline.config.nights import DriftConfig
from pipeline.errors import DamageError, JobError, UserError
from pipeline.evaluate.document import Evaluation
from pipeline.store import ObjectMissing, Store

_log = logging.getLogger(__name__)

LATEST_KEY = "latest.json"
PAGE_KEY = "index.html"
MOST_SECONDS_APART = 3600.0
"""Difference between this machine's clock and the store's from which no night is begun."""
MOST_DAYS_MISSED = 60
"""Days since the newest night from which a clock is not believed without dates."""
_HISTORY = "history/"
_RECORD = re.compile(r"history/\d{4}-\d\d-\d\d\.json")
_LEAST_NIGHTS = 3
_TRIES = 20


class Night(Settings):
    """One night, complete and evaluated."""

    format: Literal[1] = 1
    """Version of this document's layout."""
    date: dt.date
    """The night's name."""
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
    evaluation: Evaluation
    """Its figures."""
    drift: tuple[str, ...] = Field(max_length=100)
    """What was unlike the nights before, a line each; empty for a night like the others."""
    deleted: bool = False
    """Whether retention has deleted the samples."""


def night_prefix(output: str, date: dt.date) -> str:
    """Where a night's samples go."""
    return f"{output.rstrip('/')}/date={date.isoformat()}"


def night_seed(seed: int, date: dt.date) -> int:
    """A seed for each night: the settings' seed, then the date's digits."""
    return seed * 10**8 + int(date.strftime("%Y%m%d"))


def write_night(store: Store, night: Night) -> None:
    """File a night."""
    store.write(_key(night.date), (night.model_dump_json(indent=2) + "\n").encode())


def read_night(store: Store, date: dt.date) -> Night | None:
    """A night's record, or None, with a line where there is one that cannot be used."""
    return _read(store, _key(date), "the night is measured and filed again")


def read_latest(store: Store) -> Night | None:
    """The night that latest.json names, or None, with a line where it cannot be used."""
    return _read(store, LATEST_KEY, "it is written again")


def write_latest(store: Store, night: Night) -> None:
    """Point consumers at a night, whatever they were pointed at before; see `advance_latest`."""
    store.write(LATEST_KEY, (night.model_dump_json(indent=2) + "\n").encode())


def read_nights(store: Store) -> list[Night]:
    """All nights, oldest first, with a line for each record that cannot be used."""
    found: list[Night] = []
    for info in store.list(_HISTORY):
        if _RECORD.fullmatch(info.key):
            date = info.key.removeprefix(_HISTORY).removesuffix(".json")
            night = _read(
                store, info.key, f"it is left out; ddpm nightly --from {date} --to {date} makes it again"
            )
            found += [night] if night is not None else []
    return found


def newest(nights: Sequence[Night], today: dt.date) -> Night | None:
    """The newest night whose samples are kept and that is not dated in the future."""
    there = [night for night in nights if not night.deleted and night.date <= today]
    return max(there, key=lambda night: night.date, default=None)


def advance_latest(store: Store, today: dt.date) -> Night | None:
    """Let latest.json name the newest night on record; returns the night that it names then.

    Several jobs may do so at once, and one may be held up just before it writes. So each looks again after it wrote,
    and ends only when the pointer is not behind the records. JobError when others keep rewriting it.
    """
    for _ in range(_TRIES):
        night = newest(read_nights(store), today)
        latest = read_latest(store)  # last, so that little time is left for another to write it
        ahead = latest is not None and latest.date > today
        if ahead and latest is not None:
            _log.warning("latest.json named %s, which has not come yet (it is %s)", latest.date, today)
        if night is None or (latest is not None and not ahead and _stands(latest, night)):
            return latest
        write_latest(store, night)
    raise JobError(f"{store.uri}/{LATEST_KEY}: other jobs keep rewriting it; run this again")


def today_by(store: Store, now: dt.datetime) -> dt.date:
    """Today's date (UTC), on which this machine's clock (`now`) and the store's agree. UserError where they do not.

    A night is named by its date, and retention goes by dates: neither may rest on one wrong clock.
    """
    theirs = store.server_time()
    if theirs is None:
        return now.date()
    if abs((now - theirs).total_seconds()) > MOST_SECONDS_APART:
        raise UserError(
            f"clock: this machine says {now:%F %T}Z and {store.uri} says {theirs:%F %T}Z; set the wrong one (NTP), "
            "then run this again: no night is made or deleted by a clock alone"
        )
    return theirs.date()


def drift(evaluation: Evaluation, earlier: Sequence[Night], config: DriftConfig) -> tuple[str, ...]:
    """What sets a night apart from the trailing ones, a line each. Nights on other terms are no yardstick."""
    fellows = [n.evaluation for n in earlier if n.evaluation.terms == evaluation.terms][-config.nights :]
    if len(fellows) < _LEAST_NIGHTS:
        return ()
    lines: list[str] = []
    for name in config.metrics:
        values = [fellow[name] for fellow in fellows if name in fellow.metrics]
        if name not in evaluation.metrics or len(values) < _LEAST_NIGHTS:
            continue
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        change = evaluation[name] - mean
        if abs(change) > max(config.max_deviations * deviation, config.min_share * abs(mean)):
            lines.append(
                f"{name} is {evaluation[name]:.4g}, the {len(values)} nights before had {mean:.4g} ± {deviation:.2g}"
            )
    return tuple(lines)


def expired(
    nights: Sequence[Night],
    latest: dt.date | None,
    today: dt.date,
    keep_nights: int | None,
    keep_days: int | None,
) -> list[Night]:
    """Nights whose samples are to go: beyond the newest `keep_nights`, or older than `keep_days`; never `latest`.

    Nights after `today` are not counted and do not go.
    """
    there = sorted(
        (n for n in nights if not n.deleted and n.date <= today), key=lambda n: n.date, reverse=True
    )
    out: list[Night] = []
    for place, night in enumerate(there):
        too_many = keep_nights is not None and place >= keep_nights
        too_old = keep_days is not None and (today - night.date).days > keep_days
        if (too_many or too_old) and night.date != latest:
            out.append(night)
    return out


def dates_to_make(
    latest: dt.date | None, today: dt.date, first: dt.date | None, last: dt.date | None, most: int
) -> list[dt.date]:
    """The nights of a call: those from `first` to `last` if told, else those since the latest, today's the last.

    UserError for a date that has not come yet, and without dates where more days were missed than a clock is believed.
    """
    for flag, date in (("--from", first), ("--to", last)):
        if date is not None and date > today:
            raise UserError(f"{flag}: {date} has not come yet (it is {today} UTC); name a night up to today")
    if first is None and last is None:
        if latest is not None and (today - latest).days > MOST_DAYS_MISSED:
            raise UserError(
                f"nightly: the newest night is {latest}, and the clock says {today}, {(today - latest).days} days "
                f"later; if that is right, name the nights once: --from {today}"
            )
        begin = today if latest is None else min(today, latest + dt.timedelta(days=1))
        begin = max(begin, today - dt.timedelta(days=most - 1))
        end = today
    else:
        end = last or today
        begin = first or end
    return [begin + dt.timedelta(days=n) for n in range((end - begin).days + 1)]


def _stands(latest: Night, night: Night) -> bool:
    """Whether latest.json may stay: it names the newest night as its record does, or one whose record is gone."""
    return latest == night or latest.date > night.date


def _key(date: dt.date) -> str:
    return f"{_HISTORY}{date.isoformat()}.json"


def _read(store: Store, key: str, otherwise: str) -> Night | None:
    """A record, or None; a line, with what comes of it, for one that is no record or another night's."""
    try:
        night = parse_document(Night, store.read(key), f"{store.uri}/{key}", "a night's record")
    except ObjectMissing:
        return None
    except DamageError as error:
        _log.warning("%s: %s", error, otherwise)
        return None
    if key not in (LATEST_KEY, _key(night.date)):
        _log.warning("%s/%s: is the record of %s: %s", store.uri, key, night.date, otherwise)
        return None
    return night
