"""The nightly job: the champion fills the night's prefix; the night is measured, compared, filed and pointed at.

    python -m jobs.nightly digits
    python -m jobs.nightly digits --from 2026-03-01 --to 2026-03-03

A night is named by its date. Started again, after a crash or for no reason, it completes what is missing or does
nothing. The model of a night is chosen once: a night that began with one champion ends with it.
"""

import argparse
import datetime as dt
import fcntl
import hashlib
import json
import os
import sys
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jobs.evaluate import evaluate, evaluation_place, kept_evaluation
from jobs.generate import generate
from jobs.progress import Progress
from jobs.shell import DONE, FAILED, STOPPED, Call, guarded, run_job
from pipeline.config.generate import GenerateConfig
from pipeline.config.nightly import NightlyConfig
from pipeline.errors import UserError
from pipeline.evaluate.history import (
    PAGE_KEY,
    Night,
    dates_to_make,
    drift,
    expired,
    night_prefix,
    night_seed,
    read_latest,
    read_night,
    read_nights,
    write_latest,
    write_night,
)
from pipeline.evaluate.logbook import try_to_log
from pipeline.evaluate.networks import open_network
from pipeline.evaluate.page import render
from pipeline.evaluate.record import network_for_sums
from pipeline.evaluate.reference import data_root
from pipeline.generate.manifest import MANIFEST_KEY, Manifest, read_manifest
from pipeline.generate.report import CONTACT_KEY
from pipeline.generate.spec import read_spec
from pipeline.private import open_private, state_folder
from pipeline.store import ObjectMissing, Store, open_store

DRIFTED = 3
"""Exit code of a night that is complete and unlike the nights before."""


def main(argv: Sequence[str] | None = None) -> int:
    """Settings in, exit code out: 0 done, 1 failed, 2 refused, 3 done and drifted, 143 drained."""
    parser = argparse.ArgumentParser(prog="python -m jobs.nightly")
    parser.add_argument("words", nargs="*", metavar="[PRESET] key=value …")
    parser.add_argument("--config", action="append", type=Path, default=[], help="YAML file; may be repeated")
    parser.add_argument("--from", dest="first", help="first night, YYYY-MM-DD")
    parser.add_argument("--to", dest="last", help="last night, YYYY-MM-DD")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and stop")
    told = parser.parse_intermixed_args(argv)
    call = Call.of(told.words, told.config, told.dry_run)
    return guarded(lambda: run_call(call, told.first, told.last))


def run_call(call: Call, first: str | None = None, last: str | None = None) -> int:
    """Run the nights from `first` to `last`, or those that are due."""
    span = (_date(first, "--from"), _date(last, "--to"))
    return run_job("nightly", NightlyConfig, lambda c, p: run(c, p, *span), call, unit="images")


def run(
    config: NightlyConfig, progress: Progress, first: dt.date | None = None, last: dt.date | None = None
) -> int:
    """Make every night that is asked for and not complete; returns the worst exit code."""
    store = open_store(config.generate.output)
    store.require_container()
    today = dt.datetime.now(dt.UTC).date()
    with only_one(store.uri):
        latest = read_latest(store)
        asked = dates_to_make(
            None if latest is None else latest.date, today, first, last, config.catch_up_nights
        )
        if not asked:
            raise UserError("--from: is after --to; swap them")
        open_network(
            config.evaluate.network, data_root(config.evaluate.reference)
        )  # before the work, not after
        codes: list[int] = []
        for date in asked:
            codes.append(one_night(config, store, date, today, progress))
            if codes[-1] == STOPPED:
                return STOPPED
        return next((code for code in (FAILED, DRIFTED) if code in codes), DONE)


def one_night(config: NightlyConfig, store: Store, date: dt.date, today: dt.date, progress: Progress) -> int:
    """One night from the champion to latest.json. Each step does nothing where its result is there already."""
    night = read_night(store, date)
    latest = read_latest(store)
    if night is not None and latest is not None and latest.date >= date:
        print(f"{date}: complete, nothing to do")
        return DONE
    if night is None:
        asked = night_settings(config, date)
        result = generate(asked, progress)
        if result.status not in ("complete", "already complete", "superseded"):
            alert(
                config,
                date,
                f"generation {result.status}: {result.reason or dict(list(result.failed.items())[:3])}",
            )
            return STOPPED if result.status == "drained" else FAILED
        night = measured_night(config, store, date, asked, progress)
        write_night(store, night)
    publish(config, store, night, today)
    figures = night.evaluation.metrics
    shown = ", ".join(f"{name} {figures[name].value:.4g}" for name in config.drift.metrics if name in figures)
    print(f"{date}: {night.count:,} samples of {night.model} at {night.prefix}  {shown}")
    if night.drift:
        alert(config, date, "; ".join(night.drift))
        return DRIFTED
    return DONE


def night_settings(config: NightlyConfig, date: dt.date) -> GenerateConfig:
    """The generation of a night: its prefix, its seed, the version that is champion or was when it began, and the
    feature network by which it will be judged, so that its workers add the sums to their records.
    """
    prefix = night_prefix(config.generate.output, date)
    spec = read_spec(open_store(prefix))
    changes: dict[str, object] = {"output": prefix, "seed": night_seed(config.generate.seed, date)}
    if spec is not None and spec.model.version is not None:
        changes["model"] = f"{spec.model.name}/{spec.model.version}"
    if config.generate.features is None:
        judge = config.evaluate
        changes["features"] = network_for_sums(judge.network, data_root(judge.reference))
    return GenerateConfig.model_validate(config.generate.model_dump() | changes)


def measured_night(
    config: NightlyConfig, store: Store, date: dt.date, asked: GenerateConfig, progress: Progress
) -> Night:
    """Evaluate a complete generation and compare it with the nights before."""
    manifest = read_manifest(open_store(asked.output))
    if manifest is None:
        raise UserError(
            f"{asked.output}: no manifest, though its generation ended; is another job deleting there?"
        )
    kept = kept_evaluation(asked.output)
    found = kept if kept is not None and kept.spec_digest == manifest.spec_digest else None
    evaluation = found or evaluate(config.evaluate, asked.output, _measured(manifest.count, progress))
    logged = try_to_log(evaluation, config.evaluate.track)
    if logged is not None:
        print(f"{date}: figures {logged}")
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


def publish(config: NightlyConfig, store: Store, night: Night, today: dt.date) -> None:
    """Retention, the history page and, last of all, latest.json, which never goes back in time."""
    latest = read_latest(store)
    newest = night if latest is None or latest.date <= night.date else latest
    # What consumers read now stays until latest.json names another night.
    spared = {newest.date} | ({latest.date} if latest is not None else set[dt.date]())
    for old in expired(read_nights(store), newest.date, today, config.keep_nights, config.keep_days):
        if old.date not in spared:
            delete_samples(store, old)
    nights = read_nights(store)
    shown = [n for n in reversed(nights) if not n.deleted][: config.max_shown]
    sheets = {n.date.isoformat(): sheet for n in shown if (sheet := _sheet(n.prefix)) is not None}
    name = config.generate.output.rstrip("/").rsplit("/", 1)[-1]
    store.write(PAGE_KEY, render(f"Nightly samples: {name}", nights, sheets))
    if newest is night:
        write_latest(store, night)


def delete_samples(store: Store, night: Night) -> None:
    """Delete a night's objects, its manifest first: a generation without manifest is no complete one."""
    samples = open_store(night.prefix)
    samples.delete(MANIFEST_KEY)
    for info in list(samples.list()):
        samples.delete(info.key)
    parent, name = evaluation_place(night.prefix)
    open_store(parent).delete(name)
    write_night(store, night.model_copy(update={"deleted": True}))
    print(f"{night.date}: samples deleted by retention")


def alert(config: NightlyConfig, date: dt.date, what: str) -> None:
    """Say it on stderr and, if one is set, to the webhook, whose failure is said and changes nothing."""
    print(f"alert    {date}: {what}", file=sys.stderr, flush=True)
    if config.webhook is None:
        return
    body = json.dumps(
        {"text": f"{config.generate.output} {date}: {what}", "date": date.isoformat(), "what": what}
    )
    request = urllib.request.Request(config.webhook, body.encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20):
            return
    except (OSError, ValueError) as error:
        print(f"alert    the webhook did not take it ({error})", file=sys.stderr, flush=True)


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


if __name__ == "__main__":
    sys.exit(main())
