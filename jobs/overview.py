"""What goes on, for `ddpm status`: jobs, nights, disk, versions. Each part says why where it knows nothing."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from ddpm_pipeline import __version__
from ddpm_pipeline.errors import OneLineError
from ddpm_pipeline.jobs.cluster_address import ask, dashboard_address
from ddpm_pipeline.store import Store, open_store

PACKAGES = ("ray", "mlflow", "torch")
MAX_FILES = 200_000
"""More files of the stack are not counted: that would take seconds."""
MAX_NIGHTS = 20
_NIGHTS = "nightly/"


def jobs_of_cluster() -> dict[str, Any]:
    """Number of jobs by status, and the names of those that run; `problem` where the cluster does not say."""
    if dashboard_address() is None:
        return {"problem": "no cluster is named"}
    try:
        found: Any = ask("/api/jobs/")
    except (OSError, ValueError) as error:
        return {"problem": f"the cluster's answer cannot be read ({error})"}
    if not isinstance(found, list):
        return {"problem": "the cluster does not answer"}
    listed: list[dict[str, Any]] = [job for job in found if job.get("type") == "SUBMISSION"]  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    running = [str(job.get("submission_id")) for job in listed if job.get("status") == "RUNNING"]
    return {"statuses": dict(Counter(str(job.get("status")) for job in listed)), "running": running}


def nights_of_root() -> dict[str, Any]:
    """The newest night of each nightly job below the data root; `problem` where the store cannot be read."""
    root = os.environ.get("DDPM_ROOT")
    if not root:
        return {"problem": "DDPM_ROOT is not set"}
    try:
        store = open_store(root)
        store.require_container(wait_seconds=0)
        return {"nights": [night for night in map(_night(store), _names(store)) if night is not None]}
    except OneLineError as error:
        return {"problem": str(error)}


def disk_of(folder: Path) -> dict[str, Any]:
    """Bytes of the stack's files and free bytes of its disk; `at_least` where there are too many files to count."""
    place = folder if folder.is_dir() else Path()
    used, number = 0, 0
    for size in _sizes(folder):
        used, number = used + size, number + 1
        if number >= MAX_FILES:
            break
    free = shutil.disk_usage(place).free
    return {"used_bytes": used, "at_least": number >= MAX_FILES, "free_bytes": free}


def versions() -> dict[str, str]:
    """Versions of the program and of what it rests on."""
    found = {"ddpm": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def overview_lines(facts: dict[str, dict[str, Any]]) -> list[str]:
    """The facts of all parts, one line each; a line for each night."""
    jobs, nights, disk = facts["jobs"], facts["nights"], facts["disk"]
    counted = ", ".join(f"{number} {status.lower()}" for status, number in jobs.get("statuses", {}).items())
    running = f" ({', '.join(jobs['running'][:5])})" if jobs.get("running") else ""
    lines = [f"jobs     {jobs.get('problem') or counted or 'none yet'}{running}"]
    if "problem" in nights:
        lines.append(f"nights   {nights['problem']}")
    else:
        lines += [f"nights   {_night_line(night)}" for night in nights["nights"]] or ["nights   none yet"]
    used = f"{'over ' if disk['at_least'] else ''}{_gib(disk['used_bytes'])}"
    lines.append(f"disk     {used} used by the local stack, {_gib(disk['free_bytes'])} free")
    return [
        *lines,
        "versions " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    ]


def _names(store: Store) -> Iterator[str]:
    """Names of nightly jobs: the folders below `nightly/`, each found by one short listing."""
    after = ""
    for _ in range(MAX_NIGHTS):
        first = next(iter(store.list(_NIGHTS, start_after=after)), None)
        if first is None:
            return
        name = first.key.removeprefix(_NIGHTS).partition("/")[0]
        yield name
        after = f"{_NIGHTS}{name}0"  # the character after '/'


def _night(store: Store) -> Any:
    def read(name: str) -> dict[str, Any] | None:
        from ddpm_pipeline.nightly.history import read_latest  # only who has nights imports it

        latest = read_latest(open_store(f"{store.uri}/{_NIGHTS}{name}"))
        if latest is None:
            return None
        facts = {"name": name, "date": latest.date.isoformat(), "count": latest.count, "model": latest.model}
        return facts | {"drift": list(latest.drift)}

    return read


def _night_line(night: dict[str, Any]) -> str:
    drift = "; ".join(night["drift"]) or "no drift"
    return f"{night['name']} {night['date']}, {night['count']:,} samples of {night['model']}, {drift}"


def _sizes(folder: Path) -> Iterator[int]:
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(os.path.join(root, name)).st_size
            except OSError:  # deleted since it was listed
                continue


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
