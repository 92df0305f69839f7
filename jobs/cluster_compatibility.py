"""Whether a cluster has the software that a job from here needs, asked before the job is handed over.

Ray and Python are told by the head. The packages are told by a job of a second, `versions-SESSION`, that runs once in a
cluster's life and whose output is read again from then on. One that failed, or was evicted, is run anew.
"""

import json
import sys
from importlib import metadata
from typing import cast

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.ray_dashboard import ask
from jobs.scripts import names_of, next_name, start_script, statuses, told_by, wait_for
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


def require_compatible_cluster(client: JobSubmissionClient) -> None:
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
    """What a probe that succeeded has told, or one that runs or is started now tells."""
    base = f"versions-{session.removeprefix('session_')}"
    known = statuses(client)
    for name in names_of(known, base):
        if known[name] == JobStatus.SUCCEEDED and (told := told_by(client, name, _MARK)) is not None:
            return cast("dict[str, str | None]", told)
    going = [name for name in names_of(known, base) if not known[name].is_terminal()]
    name = going[0] if going else next_name(known, base)
    if not going:
        start_script(client, name, _PROBE, [json.dumps([need.name for need in requirements()])])
    status = wait_for(client, name, _PROBE_SECONDS)
    told = told_by(client, name, _MARK)
    if status != JobStatus.SUCCEEDED or told is None:
        raise UserError(f"{client.get_address()}: cannot tell its packages; see `ddpm logs {name}`")
    return cast("dict[str, str | None]", told)


def _public(version: str) -> str:
    """A version without its build's label, such as +cpu."""
    return version.partition("+")[0]
