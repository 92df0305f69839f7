"""The nightly job: the champion fills the night's prefix; the night is evaluated, recorded, compared and published.

A night is named by its date. Every step does nothing where its result exists, so the job can be repeated at any time:
it completes what is missing. A night keeps the model version that it began with.
"""

import datetime as dt
import fcntl
import hashlib
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.nights import NightlyConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.signed_decision import require_signed
from ddpm_pipeline.features.networks import open_network
from ddpm_pipeline.features.reference_set import data_root
from ddpm_pipeline.features.trust import require_trusted_network
from ddpm_pipeline.generate.generation_job import GenerationResult
from ddpm_pipeline.generate.layout import CONTACT_KEY
from ddpm_pipeline.generate.model_source import registered_name
from ddpm_pipeline.nightly.history import (
    PAGE_KEY,
    advance_latest,
    newest,
    night_prefix,
    pending_dates,
    read_latest,
    read_night,
    read_nights,
    today_by,
)
from ddpm_pipeline.nightly.history_page import render_history
from ddpm_pipeline.nightly.make_night import find_fault, night_settings, record_night
from ddpm_pipeline.nightly.retention import apply_retention
from ddpm_pipeline.nightly.webhook import send
from ddpm_pipeline.parallel import OpenWorkers, in_process
from ddpm_pipeline.private_files import open_private, state_folder
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.signatures import PublicKey
from ddpm_pipeline.store import ObjectMissing, Store, open_store
from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.telemetry.terminal import echo
from ddpm_pipeline.tracking import resolve

NightOutcome = Literal["done", "drifted", "failed", "drained"]
"""`drifted`: complete, and unlike the nights before. `drained`: stopped by a signal, to be continued."""
_SEVERITY: tuple[NightOutcome, ...] = ("done", "drifted", "failed", "drained")
Generate = Callable[[GenerateConfig, Progress], GenerationResult]


def run_nights(
    config: NightlyConfig,
    generate: Generate,
    progress: Progress,
    first: dt.date | None = None,
    last: dt.date | None = None,
    open_workers: OpenWorkers = in_process,
) -> NightOutcome:
    """Make the nights from `first` to `last`, or those that are pending; returns the worst outcome.

    UserError, before any work, for dates, a feature network or a clock that cannot be used.
    """
    store = open_store(config.generate.output)
    store.require_container()
    today = today_by(store, dt.datetime.now(dt.UTC))
    with exclusive(store.uri):
        previous = newest_date(store, today)
        dates = pending_dates(previous, today, first, last, config.catch_up_nights)
        if not dates:
            raise UserError("--from: is after --to; swap them")
        network, data = config.evaluate.network, data_root(config.evaluate.reference)
        require_trusted_network(
            registered_name(config.generate.model), network, data, open_network(network, data)
        )
        _require_signed(config, config.generate.model)
        by_clock = first is None and last is None
        nights = _Nights(
            config, store, today, previous if by_clock else None, generate, open_workers, progress
        )
        outcomes: list[NightOutcome] = []
        for date in dates:
            outcomes.append(nights.make(date))
            if outcomes[-1] == "drained":
                break
        return max(outcomes, key=_SEVERITY.index)


def newest_date(store: Store, today: dt.date) -> dt.date | None:
    """The newest known night, by its record or by latest.json; prints a line for each night dated in the future."""
    nights, latest = read_nights(store), read_latest(store)
    known = newest(nights, today)
    dates = [night.date for night in (known, latest) if night is not None and night.date <= today]
    for night in nights:
        if night.date > today and not night.deleted:
            echo(
                f"{night.date}: has a record, but lies in the future (a clock was wrong): latest.json and retention "
                f"ignore it; if nobody needs it, delete history/{night.date}.json and date={night.date}/",
                error=True,
            )
    return max(dates, default=None)


def _require_signed(config: NightlyConfig, model: str) -> None:
    """UserError unless the settings accept any model, or the promotion of this one is signed with their key."""
    if config.require_signed is None:
        return
    key = PublicKey.read(config.require_signed)
    if registered_name(model) is None:
        raise UserError(
            f"model: {model} is in no registry, so no promotion of it is signed (require_signed); name one that is"
        )
    require_signed(resolve(model), key)


@dataclass(frozen=True)
class _Nights:
    """Makes one night after the other at a store."""

    config: NightlyConfig
    store: Store
    today: dt.date
    previous: dt.date | None
    """The newest night when the job began; None where the dates were given by hand."""
    generate: Generate
    open_workers: OpenWorkers
    progress: Progress

    def make(self, date: dt.date) -> NightOutcome:
        """One night from the champion to latest.json. Each step does nothing where its result exists."""
        config, store = self.config, self.store
        night = read_night(store, date)
        if night is not None and night.deleted:
            echo(f"{date}: retention has deleted its samples, nothing to do")
            return "done"
        fault = None if night is None else find_fault(night, night_prefix(config.generate.output, date))
        latest = read_latest(store)
        if night is not None and fault is None and latest is not None and date <= latest.date <= self.today:
            echo(f"{date}: complete, nothing to do")
            return "done"
        if fault is not None:
            echo(f"{date}: is on record, but {fault}; making what is missing", error=True)
        if night is None or fault is not None:
            settings = night_settings(config, date, night)
            _require_signed(config, settings.model)
            result = self.generate(settings, self.progress)
            if result.status not in ("complete", "already complete", "superseded"):
                reason = result.reason or dict(list(result.failed.items())[:3])
                alert(config, date, f"generation {result.status}: {reason}")
                return "drained" if result.status == "drained" else "failed"
            night = record_night(
                config, store, date, settings.output, night, self.open_workers, self.progress
            )
        publish(config, store, self.previous, self.today)
        metrics = night.evaluation.metrics
        watched = [f"{name} {metrics[name].value:.4g}" for name in config.drift.metrics if name in metrics]
        echo(f"{date}: {night.count:,} samples of {night.model} at {night.prefix}  {', '.join(watched)}")
        if night.drift:
            alert(config, date, "; ".join(night.drift))
            return "drifted"
        return "done"


def publish(config: NightlyConfig, store: Store, previous: dt.date | None, today: dt.date) -> None:
    """Retention, the history page and, last of all, latest.json, which follows the records."""
    apply_retention(config, store, previous, today)
    nights = read_nights(store)
    shown = [night for night in reversed(nights) if not night.deleted][: config.max_shown]
    sheets: dict[str, bytes] = {}
    for night in shown:
        sheet = _contact_sheet(night_prefix(config.generate.output, night.date))
        if sheet is not None:
            sheets[night.date.isoformat()] = sheet
    name = config.generate.output.rstrip("/").rsplit("/", 1)[-1]
    store.write(PAGE_KEY, render_history(f"Nightly samples: {name}", nights, sheets))
    advance_latest(store, today)


def alert(config: NightlyConfig, date: dt.date, message: str) -> None:
    """Print a message on stderr and send it to the webhook, if one is set. A webhook that fails changes nothing."""
    echo(f"alert    {date}: {message}", error=True)
    if config.webhook is None:
        return
    content = {
        "text": f"{config.generate.output} {date}: {message}",
        "date": date.isoformat(),
        "what": message,
    }
    failure = send(config.webhook, redact(content))
    if failure is not None:
        echo(f"alert    the webhook did not accept it: {failure}", error=True)


@contextmanager
def exclusive(output: str) -> Generator[None]:
    """A lock against a second nightly job of this user on this machine at one prefix. UserError names its process.

    Across machines the job's dated name (Kubernetes, Ray) has that effect, and a generation tolerates concurrent jobs.
    """
    name = f"ddpm-nightly-{hashlib.sha256(output.encode()).hexdigest()[:16]}.lock"
    with open(open_private(state_folder("locks") / name, os.O_RDWR | os.O_CREAT), "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{output}: another nightly job is running (process {lock.read().strip()}); wait until it ends"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _contact_sheet(prefix: str) -> bytes | None:
    try:
        return open_store(prefix).read(CONTACT_KEY)
    except ObjectMissing:
        return None
