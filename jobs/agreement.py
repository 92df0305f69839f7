"""Whether a cluster has the software that a job from here needs, asked before the job is handed over.

Ray and Python are told by the head. The packages are told by a job of a second, `versions-SESSION`, that runs once in a
cluster's life and whose output is read again from then on.
"""

import json
import shlex
import sys
import time
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.dashboard import ask
from pipeline.errors import UserError

PROGRAM = "ddpm-pipeline"
SAME_BITS = ("torch", "numpy", "pillow")
"""Packages whose version decides how numbers are rounded or pictures encoded: here and there must be the same."""
_MARK = "::versions "
_PROBE_SECONDS = 120.0
_PROBE = f"""
import json, sys
from importlib import metadata
found = {{}}
for name in json.loads(sys.argv[1]):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = None
print("{_MARK}" + json.dumps(found), flush=True)
"""


def require_agreement(client: JobSubmissionClient) -> None:
    """Raise UserError, in one line, for the first difference that would fail a job or change its bits."""
    ours = {"Ray": metadata.version("ray"), "Python": ".".join(map(str, sys.version_info[:2]))}
    told = ask("/api/version")
    python = ask("/api/v0/cluster_metadata").get("data", {}).get("pythonVersion", "")
    theirs = {"Ray": told.get("ray_version", ""), "Python": ".".join(python.split(".")[:2])}
    for name, version in ours.items():
        if theirs[name] and theirs[name] != version:
            raise UserError(
                f"{client.get_address()}: runs {name} {theirs[name]}, here is {version}; submit from the cluster's "
                f"own image, or use {name} {theirs[name]} here"
            )
    packages = _packages(client, told.get("session_name", "unknown"))
    for fault in package_faults(packages):
        raise UserError(
            f"{client.get_address()}: {fault}; rebuild the cluster's image from this version's lock"
        )


def package_faults(theirs: dict[str, str | None]) -> list[str]:
    """What is wrong with a cluster's packages, a line each: missing, too old or new, or rounding differently."""
    faults: list[str] = []
    for need in requirements():
        version = theirs.get(need.name)
        if version is None:
            faults.append(f"{need.name} is not installed on the cluster")
        elif not need.specifier.contains(version, prereleases=True):
            faults.append(f"has {need.name} {version}, this program needs {need.specifier}")
        elif need.name in SAME_BITS and _public(version) != _public(metadata.version(need.name)):
            faults.append(f"has {need.name} {version}, here is {metadata.version(need.name)}")
    return faults


def requirements() -> list[Requirement]:
    """What the program itself asks for on this platform, without extras."""
    told = [Requirement(line) for line in metadata.requires(PROGRAM) or []]
    return [
        Requirement(f"{need.name}{need.specifier or SpecifierSet()}")
        for need in told
        if need.marker is None or need.marker.evaluate({"extra": ""})
    ]


def _packages(client: JobSubmissionClient, session: str) -> dict[str, str | None]:
    name = f"versions-{session.removeprefix('session_')}"
    names = json.dumps([need.name for need in requirements()])
    status = {info.submission_id: info.status for info in client.list_jobs()}.get(name)
    if status is None:
        client.submit_job(
            entrypoint=shlex.join(["python", "-c", _PROBE, names]), submission_id=name, entrypoint_num_cpus=0
        )
    deadline = time.monotonic() + _PROBE_SECONDS
    while not (status := client.get_job_status(name)).is_terminal():
        if time.monotonic() > deadline:
            raise UserError(f"{client.get_address()}: job {name} does not start; see `ddpm logs {name}`")
        time.sleep(0.2)
    lines = [line for line in client.get_job_logs(name).splitlines() if line.startswith(_MARK)]
    if status != JobStatus.SUCCEEDED or not lines:
        raise UserError(f"{client.get_address()}: cannot tell its packages; see `ddpm logs {name}`")
    return json.loads(lines[-1].removeprefix(_MARK))


def _public(version: str) -> str:
    """A version without its build's label, such as +cpu."""
    return version.partition("+")[0]
