"""Jobs on a cluster, watched from here: their names, their output, their progress, their end."""

import asyncio
import difflib
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ddpm_pipeline.errors import Outage, UserError
from ddpm_pipeline.infra.local import check_ray
from ddpm_pipeline.jobs.cluster_address import ADDRESS_VARIABLE, dashboard_address, settle_address
from ddpm_pipeline.jobs.progress_bar import MARK, clock, progress_of
from ddpm_pipeline.jobs.runner import DONE, FAILED
from ddpm_pipeline.jobs.server import UNREACHABLE, JobServer, reason
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.telemetry.terminal import echo, echo_json

ANSI = re.compile(r"\x1b\[[0-9;]*m")
# A warning about actors that Ray Data starts itself, for each of its pools. Their arguments are held until they end, so
# they cannot be lost, and the user could not act on the warning. Ray's own log files keep it.
REMARK = re.compile(
    r"\bcore_worker\.cc:\d+: Actor with class name: .* has constructor arguments in the object store"
)

_FACTS = {"what", "unit", "done", "total", "note"}


def job_client() -> JobSubmissionClient:
    """A client of the job server that the environment names. Raises UserError when it cannot be used."""
    settle_address()
    address = dashboard_address()
    if address is None:
        raise UserError(
            f"{ADDRESS_VARIABLE}: not set; start the local stack with `ddpm up`, or give your cluster's "
            "dashboard, such as http://ray.example:8265"
        )
    check_ray()  # Ray's own client would retry a wrong token for minutes
    _quieten_ray()
    try:
        return JobServer(address)
    except (ConnectionError, RuntimeError, *UNREACHABLE) as error:
        raise UserError(
            f"{ADDRESS_VARIABLE} {redact(address)}: {reason(error)}; is the cluster up?"
        ) from None


def follow(client: JobSubmissionClient, name: str) -> int:
    """Print a job's output and draw its progress until it ends; Ctrl-C leaves it running.

    Returns the job's own exit code. Raises Outage where the cluster is gone, and with it the job.
    """
    try:
        asyncio.run(_follow(client, name))
    except Outage as error:
        echo(f"note     the output of {name} broke off; {error}", error=True)
    except KeyboardInterrupt:
        echo(
            "",
            f"detached; the job keeps running.  follow it: ddpm logs -f {name}   stop it: ddpm stop {name}",
        )
        return DONE
    info = client.get_job_info(name)
    if info.status == JobStatus.SUCCEEDED:
        return DONE
    if info.driver_exit_code is not None and info.driver_exit_code > 0:
        return int(info.driver_exit_code)
    if not info.status.is_terminal():
        echo(
            f"error: job {name} is still running, but its output broke off; follow it again: ddpm logs -f {name}",
            error=True,
        )
        return FAILED
    echo(f"error: job {name} ended {info.status}: {info.message}", error=True)
    return FAILED


def print_log(client: JobSubmissionClient, name: str) -> None:
    """Print a job's output so far, without its progress lines, which `ddpm logs -f` draws."""
    for line in client.get_job_logs(name).splitlines():
        if _progress_fact(line) is None:
            _print_line(line)


def require_job(client: JobSubmissionClient, name: str) -> None:
    """Raises UserError when the cluster knows no job of this name."""
    known = [str(info.submission_id) for info in client.list_jobs()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "list them with `ddpm jobs`"
        raise UserError(f"job '{name}': unknown to this cluster; {hint}")


def print_jobs(client: JobSubmissionClient, as_json: bool = False) -> int:
    """Print the cluster's jobs, newest first."""
    if as_json:
        facts = ("submission_id", "status", "start_time", "end_time", "message", "driver_exit_code")
        rows = [{name: getattr(info, name) for name in facts} for info in _newest_first(client)]
        echo_json(rows)
    else:
        echo(*job_table(client))
    return DONE


def job_table(client: JobSubmissionClient) -> list[str]:
    """A line for each job, newest first."""
    jobs_there = _newest_first(client)
    if not jobs_there:
        return ["no jobs yet   (ddpm submit train digits)"]
    rows = [("JOB", "STATUS", "STARTED", "TOOK")]
    for info in jobs_there:
        start, end = (info.start_time or 0) / 1000, (info.end_time or 0) / 1000
        took = clock((end or time.time()) - start) if start else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start)) if start else ""
        rows.append((str(info.submission_id), str(info.status), when, took))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _newest_first(client: JobSubmissionClient) -> list[JobDetails]:
    submitted = [info for info in client.list_jobs() if info.submission_id]
    return sorted(submitted, key=lambda info: info.start_time or 0, reverse=True)


async def _follow(client: JobSubmissionClient, name: str) -> None:
    """Print the job's lines; draw a bar from its progress lines, one for each thing it counts."""
    with ExitStack() as bars:
        reports: dict[str, Progress] = {}
        async for line in _lines(client, name):
            fact = _progress_fact(line)
            if fact is None:
                _print_line(line)
                continue
            what = fact["what"]
            if what not in reports:
                reports[what] = bars.enter_context(progress_of(what, fact["unit"]))
            reports[what](fact["done"], fact["total"], fact["note"])


def _print_line(line: str) -> None:
    if REMARK.search(line):
        return
    echo(ANSI.sub("", line))


async def _lines(client: JobSubmissionClient, name: str) -> AsyncIterator[str]:
    rest = ""
    async for piece in client.tail_job_logs(name):
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def _progress_fact(line: str) -> dict[str, Any] | None:
    if not line.startswith(MARK):
        return None
    try:
        fact = json.loads(line.removeprefix(MARK))
    except json.JSONDecodeError:
        return None  # two processes wrote at once: shown as it is
    return fact if isinstance(fact, dict) and fact.keys() >= _FACTS else None


def _quieten_ray() -> None:
    """Some of Ray's modules set their own logger to INFO when they are imported."""
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] == "ray":
            logger = logging.getLogger(name)
            logger.setLevel(max(logger.level, logging.WARNING))
