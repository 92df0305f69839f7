"""Progress with rate and time left: a bar for people, lines for logs, JSON lines for a client with its own bar."""

import json
import logging
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ddpm_pipeline.progress import Progress
from ddpm_pipeline.telemetry.logs import as_json
from ddpm_pipeline.telemetry.terminal import echo, one_line

log = logging.getLogger(__name__)
MODE_VARIABLE = "DDPM_PROGRESS"
MARK = "::progress "
LINE_EVERY_SECONDS = 5.0
JSON_EVERY_SECONDS = 0.5


class Rate:
    """Units a second and seconds left, measured from the first report: earlier work does not count.

    Where the count falls back, another piece of work begins (the next night), and is measured for itself.
    """

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None
        self._last = 0

    def measure(self, done: int, total: int) -> tuple[float, float | None]:
        """Returns (units per second, seconds left or None while unknown)."""
        now = time.monotonic()
        if self._start is None or done < self._last:
            self._start = (now, done)
        self._last = done
        began, first = self._start
        rate = (done - first) / (now - began) if now > began else 0.0
        return rate, (total - done) / rate if rate > 0 else None


@contextmanager
def progress_of(what: str, unit: str = "") -> Generator[Progress]:
    """A reporter fitting the place it is used in: terminal, log file, or behind `ddpm submit`."""
    if os.environ.get(MODE_VARIABLE) == "json":
        yield _json_lines(what, unit)
    elif as_json():
        yield _records(what, unit)
    elif sys.stderr.isatty():
        with _bar(what, unit) as report:
            yield report
    else:
        yield _plain_lines(what, unit)


@contextmanager
def _bar(what: str, unit: str) -> Generator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None, rate="", note="")
        rate = Rate()

        def report(done: int, total: int, note: str = "") -> None:
            speed, _ = rate.measure(done, total)
            bar.update(task, completed=done, total=total, rate=f"{speed:,.1f} {unit}/s", note=one_line(note))

        yield report


def _plain_lines(what: str, unit: str) -> Progress:
    rate, due = Rate(), _Due(LINE_EVERY_SECONDS)

    def report(done: int, total: int, note: str = "") -> None:
        speed, left = rate.measure(done, total)
        if due(done, total):
            echo(progress_line(what, unit, done, total, speed, left, note), error=True)

    return report


def _json_lines(what: str, unit: str) -> Progress:
    due = _Due(JSON_EVERY_SECONDS)

    def report(done: int, total: int, note: str = "") -> None:
        if due(done, total):
            fact = {"what": what, "unit": unit, "done": done, "total": total, "note": note}
            echo(MARK + json.dumps(fact))

    return report


def _records(what: str, unit: str) -> Progress:
    rate, due = Rate(), _Due(LINE_EVERY_SECONDS)

    def report(done: int, total: int, note: str = "") -> None:
        speed, left = rate.measure(done, total)
        if due(done, total):
            fields = {"what": what, "unit": unit, "done": done, "total": total, "per_second": round(speed, 3)}
            log.info(progress_line(what, unit, done, total, speed, left, note), extra=fields)

    return report


class _Due:
    """Whether a line is worth printing: something changed, and the last line is old enough or the end is reached."""

    def __init__(self, every_seconds: float) -> None:
        self._every, self._next, self._shown = every_seconds, 0.0, -1

    def __call__(self, done: int, total: int) -> bool:
        now = time.monotonic()
        if done == self._shown or (done < total and now < self._next):
            return False
        self._shown, self._next = done, now + self._every
        return True


def progress_line(
    what: str, unit: str, done: int, total: int, rate: float, left_seconds: float | None, note: str
) -> str:
    """`train 300/1500 steps (20%)  12.5 steps/s  ETA 1:36  loss 0.043`."""
    share = f"{100 * done // total}%" if total else "–"
    parts = [f"{what} {done}/{total} {unit} ({share})"]
    if rate > 0:
        parts.append(f"{rate:,.1f} {unit}/s")
    if left_seconds is not None and done < total:
        parts.append(f"ETA {clock(left_seconds)}")
    if note:
        parts.append(note)
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
