"""The nights so far: a record each, what they say about drift, and which samples may be deleted."""

import datetime as dt
import statistics
from collections.abc import Sequence
from typing import Literal

from pipeline.config.base import Settings
from pipeline.config.document import parse_document
from pipeline.config.nightly import DriftConfig
from pipeline.evaluate.evaluation import Evaluation
from pipeline.store import ObjectMissing, Store

LATEST_KEY = "latest.json"
PAGE_KEY = "index.html"
_HISTORY = "history/"
_LEAST_NIGHTS = 3


class Night(Settings):
    """One night, complete and evaluated."""

    format: Literal[1] = 1
    """Version of this document's layout."""
    date: dt.date
    """The night's name."""
    prefix: str
    """Where its samples are, or were."""
    spec_digest: str
    """Names its generation."""
    model: str
    """`name/version`."""
    count: int
    """Samples."""
    images_per_second: float
    """Samples over the device time of all workers."""
    evaluation: Evaluation
    """Its figures."""
    drift: tuple[str, ...]
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
    """A night's record, or None."""
    return _read(store, _key(date))


def read_latest(store: Store) -> Night | None:
    """The night that latest.json names, or None."""
    return _read(store, LATEST_KEY)


def write_latest(store: Store, night: Night) -> None:
    """Point consumers at a night. The very last thing that a nightly job writes."""
    store.write(LATEST_KEY, (night.model_dump_json(indent=2) + "\n").encode())


def read_nights(store: Store) -> list[Night]:
    """All nights, oldest first."""
    found = [_read(store, info.key) for info in store.list(_HISTORY) if info.key.endswith(".json")]
    return [night for night in found if night is not None]


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
    """Nights whose samples are to go: beyond the newest `keep_nights`, or older than `keep_days`; never `latest`."""
    there = sorted((n for n in nights if not n.deleted), key=lambda n: n.date, reverse=True)
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
    """The nights of a call: those from `first` to `last` if told, else those since the latest, today's the last."""
    if first is None and last is None:
        begin = today if latest is None else min(today, latest + dt.timedelta(days=1))
        begin = max(begin, today - dt.timedelta(days=most - 1))
        end = today
    else:
        end = last or today
        begin = first or end
    return [begin + dt.timedelta(days=n) for n in range((end - begin).days + 1)]


def _key(date: dt.date) -> str:
    return f"{_HISTORY}{date.isoformat()}.json"


def _read(store: Store, key: str) -> Night | None:
    try:
        data = store.read(key)
    except ObjectMissing:
        return None
    return parse_document(Night, data, f"{store.uri}/{key}", "a night's record")
