"""Handing a job to a Ray cluster, and watching it from here.

What travels is the program itself (three packages) and the settings, resolved here, so that the cluster needs
neither this folder nor these files. A job is named by its settings: submitting the same twice joins the first.
"""

import asyncio
import difflib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from ray._private.runtime_env import packaging
from ray.dashboard.modules import dashboard_sdk
from ray.dashboard.modules.job import sdk
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import infra
import jobs
import pipeline
from infra.local import check_ray
from jobs.cluster import SUBMITTED, shared_variables
from jobs.progress import MARK, MODE_VARIABLE, Progress, clock, progress_of
from jobs.shell import DONE, FAILED
from pipeline.config.base import Settings
from pipeline.errors import UserError
from pipeline.track.lineage import SOURCE_VARIABLE, source_tags

PACKAGES = (pipeline, jobs, infra)
SETTINGS_FILE = "settings.yaml"
ADDRESS_VARIABLE = "RAY_JOB_ADDRESS"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def submit(job: str, settings: Settings, detach: bool = False) -> int:
    """Submit `python -m jobs.<job>` with these settings and follow it. Returns the job's exit code.

    Raises UserError when no cluster answers, or refuses our token.
    """
    client = job_client()
    content = yaml.safe_dump({job: settings.model_dump(mode="json")}, sort_keys=False)
    name, going = _job_name(client, job, content)
    if going:
        print(f"joined   job {name}, which is already going on")
    else:
        with tempfile.TemporaryDirectory(prefix="ddpm-submit-") as folder:
            _stage(Path(folder), content)
            client.submit_job(
                entrypoint=f"python -m jobs.{job} --config {SETTINGS_FILE}",
                submission_id=name,
                metadata={"job": job},
                entrypoint_num_cpus=0,
                runtime_env={"working_dir": folder, "env_vars": _variables(name)},
            )
        print(f"job      {name}  {client.get_address()}/#/jobs/{name}", flush=True)
    if detach:
        print(f"next     ddpm logs -f {name}")
        return DONE
    return follow(client, name)


def job_client() -> JobSubmissionClient:
    """A client of the job server that RAY_JOB_ADDRESS names. Raises UserError when it cannot be used."""
    address = os.environ.get(ADDRESS_VARIABLE)
    if not address:
        raise UserError(
            f"{ADDRESS_VARIABLE}: not set; start the local stack with `ddpm up`, or give your cluster's "
            "dashboard, such as http://ray.example:8265"
        )
    check_ray()  # Ray's own client would retry a wrong token for minutes
    for module in (sdk, dashboard_sdk, packaging):  # they set their own level to INFO when imported
        logging.getLogger(module.__name__).setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{ADDRESS_VARIABLE} {address}: {reason}; is the cluster up?") from None


def follow(client: JobSubmissionClient, name: str) -> int:
    """Print a job's output and draw its progress until it ends; Ctrl-C leaves it running.

    Returns the job's own exit code.
    """
    try:
        asyncio.run(_follow(client, name))
    except KeyboardInterrupt:
        print(f"\ndetached; the job goes on.  look again: ddpm logs -f {name}   end it: ddpm stop {name}")
        return DONE
    info = client.get_job_info(name)
    if info.status == JobStatus.SUCCEEDED:
        return DONE
    if info.driver_exit_code is not None and info.driver_exit_code > 0:
        return int(info.driver_exit_code)
    print(f"error: job {name} ended {info.status}: {info.message}", file=sys.stderr)
    return FAILED


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
        print(json.dumps(rows, indent=2))
    else:
        print("\n".join(job_table(client)))
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
    """Print the job's lines; draw a bar from those that tell its progress, one for each thing it counts."""
    with ExitStack() as bars:
        reports: dict[str, Progress] = {}
        async for line in _lines(client, name):
            fact = _progress_fact(line)
            if fact is None:
                print(line if sys.stdout.isatty() else ANSI.sub("", line), flush=True)
                continue
            what = fact["what"]
            if what not in reports:
                reports[what] = bars.enter_context(progress_of(what, fact["unit"]))
            reports[what](fact["done"], fact["total"], fact["note"])


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
        return json.loads(line.removeprefix(MARK))
    except json.JSONDecodeError:
        return None  # two processes wrote at once: shown as it is


def _job_name(client: JobSubmissionClient, job: str, content: str) -> tuple[str, bool]:
    """A name made of the settings, and whether the job of that name is going on.

    A finished job keeps its name for the life of the cluster: the next of the same settings is its `-r2`.
    """
    base = f"{job}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"
    known = {str(info.submission_id): info.status for info in client.list_jobs()}
    name, again = base, 1
    while name in known:
        if not known[name].is_terminal():
            return name, True
        again += 1
        name = f"{base}-r{again}"
    return name, False


def _stage(folder: Path, settings: str) -> None:
    """The program and its settings, and nothing else of the folders they lie in."""
    for package in PACKAGES:
        source = Path(str(package.__file__)).parent
        hidden = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
        shutil.copytree(source, folder / package.__name__, ignore=hidden)
    (folder / SETTINGS_FILE).write_text(settings, encoding="utf-8")


def _variables(name: str) -> dict[str, str]:
    """Where the services are; no keys, which Ray would show on its dashboard: a cluster's nodes have their own."""
    return {
        **shared_variables(),
        SUBMITTED: name,
        SOURCE_VARIABLE: json.dumps(source_tags()),
        MODE_VARIABLE: "json",
        "PYTHONUNBUFFERED": "1",
    }
