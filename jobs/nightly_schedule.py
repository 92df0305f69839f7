"""A scheduler for one machine: `ddpm schedule digits --at 02:00` runs the nightly job every night until it is ended.

The nightly job runs as a process of its own, so a crash of one night never ends the schedule. What was missed, because
the machine slept or the last night took too long, is caught up: the job itself makes every night that is due.
"""

import datetime as dt
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.blocking import BlockingScheduler
from apscheduler.triggers.cron import CronTrigger

from ddpm_pipeline.config.nights import NightlyConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.runner import DONE, PROGRAM, JobArguments, settings_of, use_running_stack
from ddpm_pipeline.nightly.history import read_latest
from ddpm_pipeline.store import Store, open_store
from ddpm_pipeline.telemetry.terminal import echo

_STOP_SECONDS = 60.0
_AT = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)")


def schedule(call: JobArguments, at: str, now: bool = False, catch_up: bool = False) -> int:
    """Run the nightly job of `call` daily at `at` (HH:MM, UTC) until SIGTERM or Ctrl-C.

    It runs at once, too, with `now`, and with `catch_up` if a night has been missed. UserError for a time that is
    none, for settings that the nightly job would refuse, and for an output that cannot be reached.
    """
    use_running_stack()
    config = settings_of(NightlyConfig, "nightly", call)
    trigger = daily(at)
    now = now or (catch_up and missed(open_store(config.generate.output), trigger, dt.datetime.now(dt.UTC)))
    runner = Runner([sys.executable, *PROGRAM, "nightly", *call.words()])
    # One thread and one instance: a night that takes longer than a day delays the next instead of meeting it.
    scheduler = BlockingScheduler(timezone=dt.UTC, executors={"default": ThreadPoolExecutor(1)})
    first: dict[str, Any] = {"next_run_time": dt.datetime.now(dt.UTC)} if now else {}
    scheduler.add_job(
        runner, trigger, id="nightly", max_instances=1, coalesce=True, misfire_grace_time=None, **first
    )
    _on_signals(lambda: threading.Thread(target=_end, args=(scheduler, runner)).start())
    echo(f"schedule: every night at {at} UTC: ddpm nightly {' '.join(call.words())}")
    scheduler.start()
    return DONE


def daily(at: str) -> CronTrigger:
    """The trigger of a time of day, HH:MM in UTC. UserError for anything else."""
    match = _AT.fullmatch(at)
    if match is None:
        raise UserError(f"--at: {at!r} is no time of day; write HH:MM, in UTC")
    return CronTrigger(hour=int(match[1]), minute=int(match[2]), timezone=dt.UTC)


def missed(store: Store, trigger: CronTrigger, now: dt.datetime) -> bool:
    """Whether a night has come due since the latest one that is complete. False if no night is complete yet."""
    store.require_container()
    latest = read_latest(store)
    if latest is None:
        return False
    begin = dt.datetime.combine(latest.date, dt.time(), dt.UTC) + dt.timedelta(days=1)
    due = trigger.get_next_fire_time(None, begin)
    return due is not None and due <= now


class Runner:
    """Runs a command to its end, one at a time, and can end it early."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()

    def __call__(self) -> int:
        """Run the command, print when it begins and how it ended; returns its exit code."""
        if self._ended.is_set():
            return DONE
        began = dt.datetime.now(dt.UTC)
        echo(f"{began:%F %T}Z nightly begins")
        self._process = subprocess.Popen(self._command)
        if self._ended.is_set():  # `end` was called while it started
            self.end()
        code = self._process.wait()
        minutes = (dt.datetime.now(dt.UTC) - began).total_seconds() / 60
        echo(f"{dt.datetime.now(dt.UTC):%F %T}Z nightly ended with {code} after {minutes:.1f} min")
        return code

    def end(self) -> None:
        """Terminate a running command and wait for it; no further one is started."""
        self._ended.set()
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _end(scheduler: BlockingScheduler, runner: Runner) -> None:
    runner.end()
    scheduler.shutdown(wait=False)


def _on_signals(act: Callable[[], None]) -> None:
    def handler(_number: int, _frame: FrameType | None) -> None:
        act()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
