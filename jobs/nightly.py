"""The nightly job: the champion fills the night's prefix; the night is measured, compared, filed and pointed at.

    ddpm nightly digits
    ddpm nightly digits --from 2026-03-01 --to 2026-03-03

A night is named by its date. Started again, after a crash or for no reason, it looks at what is there, and completes
what is missing or does nothing. The model of a night is chosen once: a night that began with one champion ends with it.
"""

import datetime as dt
import fcntl
import hashlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial

from jobs.generate import generate
from jobs.ray_map import ray_workers
from jobs.retention import retain
from jobs.runner import DONE, FAILED, STOPPED, JobArguments, run_job
from pipeline.config.generation import GenerateConfig
from pipeline.config.nights import NightlyConfig
from pipeline.errors import DamageError, UserError
from pipeline.evaluate.document import Evaluation, load_evaluation
from pipeline.evaluate.evaluation_runs import try_to_log
from pipeline.evaluate.measure import evaluate_generation
from pipeline.features.networks import open_network
from pipeline.features.reference_set import data_root
from pipeline.features.shard_sums import network_for_sums
from pipeline.features.trust import require_trusted_network
from pipeline.generate.completeness import check_complete
from pipeline.generate.layout import CONTACT_KEY, SPEC_KEY
from pipeline.generate.manifest import Manifest, read_manifest
from pipeline.generate.model_source import registered_name
from pipeline.generate.spec import read_spec
from pipeline.nightly.history import (
    PAGE_KEY,
    Night,
    advance_latest,
    dates_to_make,
    drift,
    newest,
    night_prefix,
    night_seed,
    read_latest,
    read_night,
    read_nights,
    today_by,
    write_night,
)
from pipeline.nightly.history_page import render
from pipeline.nightly.webhook import send
from pipeline.private_files import open_private, state_folder
from pipeline.progress import Progress
from pipeline.store import ObjectMissing, Store, open_store
from pipeline.telemetry.redaction import redact
from pipeline.telemetry.terminal import echo

DRIFTED = 3
"""Exit code of a night that is complete and unlike the nights before."""


def run_call(call: JobArguments, first: str | None = None, last: str | None = None) -> int:
    """Run the nights from `first` to `last`, or those that are due."""
    span = (_date(first, "--from"), _date(last, "--to"))
    return run_job("nightly", NightlyConfig, lambda c, p: run(c, p, *span), call, unit="images")


def run(
    config: NightlyConfig, progress: Progress, first: dt.date | None = None, last: dt.date | None = None
) -> int:
    """Make every night that is asked for and not complete; returns the worst exit code."""
    store = open_store(config.generate.output)
    store.require_container()
    today = today_by(store, dt.datetime.now(dt.UTC))
    with only_one(store.uri):
        before = newest_date(store, today)
        asked = dates_to_make(before, today, first, last, config.catch_up_nights)
        if not asked:
            raise UserError("--from: is after --to; swap them")
        judge, data = config.evaluate.network, data_root(config.evaluate.reference)
        network = open_network(judge, data)  # before the work, not after
        require_trusted_network(registered_name(config.generate.model), judge, data, network)
        by_clock = before if first is None and last is None else None
        codes: list[int] = []
        for date in asked:
            codes.append(one_night(config, store, date, today, by_clock, progress))
            if codes[-1] == STOPPED:
                return STOPPED
        return next((code for code in (FAILED, DRIFTED) if code in codes), DONE)


def newest_date(store: Store, today: dt.date) -> dt.date | None:
    """The newest night that is known, by its record or by latest.json; a line for those dated in the future."""
    nights, latest = read_nights(store), read_latest(store)
    known = newest(nights, today)
    dates = [night.date for night in (known, latest) if night is not None and night.date <= today]
    for night in nights:
        if night.date > today and not night.deleted:
            echo(
                f"{night.date}: has a record, though it has not come yet (a clock was wrong): latest.json and "
                f"retention leave it out; delete history/{night.date}.json and date={night.date}/ if nobody wants it",
                error=True,
            )
    return max(dates, default=None)


def one_night(
    config: NightlyConfig,
    store: Store,
    date: dt.date,
    today: dt.date,
    before: dt.date | None,
    progress: Progress,
) -> int:
    """One night from the champion to latest.json. Each step does nothing where its result is there already.

    `before` is the newest night that was there when the job began; None where the dates were told by hand.
    """
    night = read_night(store, date)
    if night is not None and night.deleted:
        echo(f"{date}: its samples were deleted by retention, nothing to do")
        return DONE
    fault = None if night is None else what_is_wrong(night, night_prefix(config.generate.output, date))
    latest = read_latest(store)
    if night is not None and fault is None and latest is not None and date <= latest.date <= today:
        echo(f"{date}: complete, nothing to do")
        return DONE
    if fault is not None:
        echo(f"{date}: is on record, but {fault}; making what is missing", error=True)
    if night is None or fault is not None:
        asked = night_settings(config, date, night)
        result = generate(asked, progress)
        if result.status not in ("complete", "already complete", "superseded"):
            what = result.reason or dict(list(result.failed.items())[:3])
            alert(config, date, f"generation {result.status}: {what}")
            return STOPPED if result.status == "drained" else FAILED
        night = filed_night(config, store, date, asked, night, progress)
    publish(config, store, before, today)
    figures = night.evaluation.metrics
    shown = ", ".join(f"{name} {figures[name].value:.4g}" for name in config.drift.metrics if name in figures)
    echo(f"{date}: {night.count:,} samples of {night.model} at {night.prefix}  {shown}")
    if night.drift:
        alert(config, date, "; ".join(night.drift))
        return DRIFTED
    return DONE


def what_is_wrong(night: Night, prefix: str) -> str | None:
    """What contradicts a night's record at its prefix, by manifest, listings and done-records; None if nothing does."""
    store = open_store(prefix)
    try:
        spec = read_spec(store)
    except DamageError as error:
        return str(error)
    if spec is None:
        return f"there is no {SPEC_KEY} at {prefix}"
    if spec.digest != night.spec_digest:
        return f"another generation is at {prefix} than the record names"
    proof = check_complete(store, spec)
    if proof.faults:
        return f"{prefix}/{proof.faults[0]}" + (
            f" ({proof.num_faults} faults)" if proof.num_faults > 1 else ""
        )
    if not proof.complete:
        return f"there is no manifest of {spec.count:,} samples at {prefix}"
    return (
        None
        if spec.count == night.count
        else f"{spec.count:,} samples are at {prefix}, {night.count:,} on record"
    )


def night_settings(config: NightlyConfig, date: dt.date, night: Night | None = None) -> GenerateConfig:
    """The generation of a night: its prefix, its seed, the version that is champion or was when it began (by its spec,
    or by the record of a night whose spec is gone), and the feature network by which it will be judged, so that its
    workers add the sums to their records.
    """
    prefix = night_prefix(config.generate.output, date)
    spec = read_spec(open_store(prefix))
    changes: dict[str, object] = {"output": prefix, "seed": night_seed(config.generate.seed, date)}
    if spec is not None and spec.model.version is not None:
        changes["model"] = f"{spec.model.name}/{spec.model.version}"
    elif spec is None and night is not None and "/" in night.model:
        changes["model"] = night.model
    if config.generate.features is None:
        judge = config.evaluate
        changes["features"] = network_for_sums(judge.network, data_root(judge.reference))
    return GenerateConfig.model_validate(config.generate.model_dump() | changes)


def filed_night(
    config: NightlyConfig,
    store: Store,
    date: dt.date,
    asked: GenerateConfig,
    filed: Night | None,
    progress: Progress,
) -> Night:
    """The record of a night whose generation has ended: the one that is filed, if it names that generation, or a new
    one, which is filed.
    """
    manifest = read_manifest(open_store(asked.output))
    if manifest is None:
        raise UserError(
            f"{asked.output}: no manifest, though its generation ended; is another job deleting there?"
        )
    if filed is not None and (filed.spec_digest, filed.count) == (manifest.spec_digest, manifest.count):
        return filed
    night = measured_night(config, store, date, asked, manifest, progress)
    write_night(store, night)
    return night


def measured_night(
    config: NightlyConfig,
    store: Store,
    date: dt.date,
    asked: GenerateConfig,
    manifest: Manifest,
    progress: Progress,
) -> Night:
    """Evaluate a complete generation and compare it with the nights before."""
    evaluation = _kept(asked.output, manifest) or evaluate_generation(
        config.evaluate,
        asked.output,
        _measured(manifest.count, progress),
        partial(ray_workers, config.evaluate.num_workers, "nightly.evaluate"),
        None if manifest.spec.model.version is None else manifest.spec.model.name,
    )
    logged = try_to_log(evaluation, config.evaluate.track)
    if logged is not None:
        echo(f"{date}: figures {logged}")
    earlier = [night for night in read_nights(store) if night.date < date]
    model = manifest.spec.model
    return Night(
        date=date,
        prefix=asked.output,
        spec_digest=manifest.spec_digest,
        model=model.name if model.version is None else f"{model.name}/{model.version}",
        count=manifest.count,
        images_per_second=_speed(manifest),
        evaluation=evaluation,
        drift=drift(evaluation, earlier, config.drift),
    )


def publish(config: NightlyConfig, store: Store, before: dt.date | None, today: dt.date) -> None:
    """Retention, the history page and, last of all, latest.json, which follows the records."""
    retain(config, store, before, today)
    nights = read_nights(store)
    shown = [n for n in reversed(nights) if not n.deleted][: config.max_shown]
    sheets = {
        n.date.isoformat(): sheet
        for n in shown
        if (sheet := _sheet(night_prefix(config.generate.output, n.date))) is not None
    }
    name = config.generate.output.rstrip("/").rsplit("/", 1)[-1]
    store.write(PAGE_KEY, render(f"Nightly samples: {name}", nights, sheets))
    advance_latest(store, today)


def alert(config: NightlyConfig, date: dt.date, what: str) -> None:
    """Say it on stderr and, if one is set, to the webhook, whose failure is said and changes nothing."""
    echo(f"alert    {date}: {what}", error=True)
    if config.webhook is None:
        return
    content = {"text": f"{config.generate.output} {date}: {what}", "date": date.isoformat(), "what": what}
    failure = send(config.webhook, redact(content))
    if failure is not None:
        echo(f"alert    the webhook did not take it: {failure}", error=True)


@contextmanager
def only_one(output: str) -> Generator[None]:
    """No second nightly job of this user on this machine at the same prefix. UserError says which process has it.

    Across machines the job's dated name (Kubernetes, Ray) does the same, and the generation tolerates company.
    """
    name = f"ddpm-nightly-{hashlib.sha256(output.encode()).hexdigest()[:16]}.lock"
    with open(open_private(state_folder("locks") / name, os.O_RDWR | os.O_CREAT), "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{output}: a nightly job is at work there (process {lock.read().strip()}); wait for its end"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _measured(count: int, progress: Progress) -> Progress:
    """The progress of an evaluation, which counts other images besides (held-out ones), told in a night's samples."""

    def report(done: int, total: int, note: str = "") -> None:
        progress(count * done // max(1, total), count, note or "measured")

    return report


def _kept(prefix: str, manifest: Manifest) -> Evaluation | None:
    """The evaluation of this very generation, if it was made before and can be used."""
    try:
        kept = load_evaluation(prefix)
    except DamageError as error:
        echo(f"{error}: measuring again", error=True)
        return None
    same = kept is not None and (kept.spec_digest, kept.terms.count) == (manifest.spec_digest, manifest.count)
    return kept if same else None


def _sheet(prefix: str) -> bytes | None:
    try:
        return open_store(prefix).read(CONTACT_KEY)
    except ObjectMissing:
        return None


def _speed(manifest: Manifest) -> float:
    return manifest.count / max(1e-9, manifest.times.device_seconds)


def _date(text: str | None, flag: str) -> dt.date | None:
    if text is None:
        return None
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        raise UserError(f"{flag}: {text!r} is no date; write YYYY-MM-DD") from None
