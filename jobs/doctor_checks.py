"""What `ddpm doctor` looks at. Each check makes one quick, real request and gives a remedy for a fault."""

import email.utils
import os
import re
import shlex
import shutil
import socket
import stat
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import check_ray
from ddpm_pipeline.infra.local.service import get
from ddpm_pipeline.installation import DISTRIBUTION, LOCKS, checkout, declared_requirements
from ddpm_pipeline.jobs.cluster_address import ask, dashboard_address
from ddpm_pipeline.jobs.doctor_findings import Finding, refused
from ddpm_pipeline.jobs.doctor_gpus import check_cluster_gpus, check_gpus
from ddpm_pipeline.store import open_store
from ddpm_pipeline.store.conditional_writes import heeds_conditions
from ddpm_pipeline.tracking import (
    MAX_CLOCK_SKEW_SECONDS,
    artifact_location,
    require_server,
    server_version,
    try_direct_artifacts,
)

MIN_FREE_BYTES = 2 * 2**30
MAX_USED_SHARE = 0.95  # Ray gives no more work to a node whose disk is fuller
MIN_SHM_BYTES = 2**30  # Docker gives 64 MiB, in which Ray's object store and NCCL do not fit
TIMEOUT_SECONDS = 5.0
STOP_ADVICE = (
    "end jobs by `ddpm stop`, which lets them save: Ray's own stop kills after RAY_JOB_STOP_WAIT_TIME_S, 3 s unless "
    "the cluster's owner changed it"
)
Environ = Mapping[str, str]


def read_pins(lock: Path) -> list[Requirement]:
    """What a lock file pins; its hashes and options are pip's to read."""
    lines = lock.read_text().splitlines()
    return [Requirement(line.rstrip(" \\")) for line in lines if re.match("[a-z]", line)]


def check_packages(locks: Sequence[Path] = LOCKS) -> Finding:
    """Installed packages against what the program requires, and against the locks: jobs and cluster must agree on them
    to agree on bits. A wheel's environment may differ from the locks, which is a remark and no problem.
    """
    python, names = ".".join(map(str, sys.version_info[:3])), " and ".join(lock.name for lock in locks)
    unfit = [fault for line in declared_requirements() or [] if (fault := _unmet(Requirement(line)))]
    if unfit:
        remedy = "make install" if checkout() else f"pip install --upgrade {DISTRIBUTION}"
        return Finding("packages", False, _some(unfit), f"{remedy}, which installs what the program requires")
    if not all(lock.exists() for lock in locks):
        return Finding("packages", True, f"Python {python}; not compared: no {names} beside the program")
    wanted = [pin for lock in locks for pin in read_pins(lock)]
    here = [pin for pin in wanted if pin.marker is None or pin.marker.evaluate()]
    wrong = [fault for pin in here if (fault := _difference(pin))]
    if not wrong:
        return Finding("packages", True, f"Python {python}; all {len(here)} as {names} pin them")
    if checkout():
        remedy = f"make install (infra/install.sh runtime), which installs what {names} pin"
        return Finding("packages", False, _some(wrong), remedy)
    found = f"Python {python}; not as {names} pin them: {_some(wrong)}"
    options = " ".join(f"-r {shlex.quote(str(lock))}" for lock in locks)
    remedy = f"nothing, or for the tested versions, and equal bits where they are used: pip install --no-deps {options}"
    return Finding("packages", True, found, remedy)


def check_credentials(environ: Environ = os.environ) -> Finding:
    """Whether S3 keys can be found, and from where; never what they are."""
    if not environ.get("DDPM_ROOT", "s3:").startswith("s3:"):
        return Finding("credentials", True, "none needed: data is in files")
    import boto3
    from botocore.exceptions import BotoCoreError

    try:
        found = boto3.session.Session().get_credentials()
    except BotoCoreError as error:
        return Finding("credentials", False, str(error), "correct AWS_PROFILE or ~/.aws/config")
    if found is None:
        remedy = "start the local stack (ddpm up), or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return Finding("credentials", False, "no S3 keys found", remedy)
    return Finding("credentials", True, f"S3 keys from {found.method}")


def check_bucket(environ: Environ = os.environ, write: bool = False) -> Finding:
    """Whether the data root can be listed; with `write`, also written to and read back."""
    root = environ.get("DDPM_ROOT")
    if not root:
        remedy = "start the local stack (ddpm up), or export DDPM_ROOT=s3://your-bucket"
        return Finding("bucket", False, "DDPM_ROOT is not set", remedy)
    try:
        store = open_store(root)
        store.require_container(wait_seconds=0)
        if not write:
            return Finding("bucket", True, f"{root} can be listed")
        key, text = f"doctor/{socket.gethostname()}-{os.getpid()}", os.urandom(1024)
        store.write(key, text)
        same = store.read(key) == text
        store.delete(key)
        heeds = heeds_conditions(store, "doctor/")
    except UserError as error:
        return refused("bucket", error)
    if not same:
        return Finding("bucket", False, f"{root}: reads back other bytes than written", "repair the store")
    how = "If-None-Match" if heeds else "consensus of the jobs"
    return Finding(
        "bucket",
        True,
        f"{root} can be listed, written, read and deleted from; empty prefixes are claimed by {how}",
    )


def check_mlflow(environ: Environ = os.environ) -> Finding:
    """Whether the tracking server answers, accepts us, and is of our version."""
    try:
        url = require_server(environ.get("MLFLOW_TRACKING_URI"), TIMEOUT_SECONDS, wait_seconds=0)
    except UserError as error:
        return refused("mlflow", error)
    server, ours = server_version(url, TIMEOUT_SECONDS), metadata.version("mlflow")
    if server and server.split(".")[:2] != ours.split(".")[:2]:
        return Finding(
            "mlflow", False, f"{url} runs {server}, here is {ours}", "use one version on both sides"
        )
    return Finding("mlflow", True, f"{url} runs {server or 'an unknown version'}")


def check_mlflow_artifacts(environ: Environ = os.environ, write: bool = False) -> Finding:
    """Whether artifacts can be stored where this client would have to write them itself."""
    name, url = "artifacts", environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    try:
        location = artifact_location(url, TIMEOUT_SECONDS) if url else ""
    except UserError:
        return Finding(name, True, "not checked: MLflow does not answer")
    if not location:
        return Finding(name, True, "no experiment yet" if url else "no server to check")
    place = urlsplit(location)
    if place.scheme == "mlflow-artifacts":
        return Finding(name, True, "through the server")
    if place.scheme in ("", "file") and not _host(url).startswith(("127.", "localhost")):
        remedy = "start the server with --serve-artifacts, and use a new experiment"
        return Finding(name, False, f"{location} is a folder of each client's own machine", remedy)
    if place.scheme == "s3":
        try:
            try_direct_artifacts(location, write)
        except UserError as error:
            return refused(name, error)
    return Finding(name, True, f"clients store them themselves, at {location}")


def check_mlflow_password(environ: Environ = os.environ) -> Finding:
    """MLflow's server has routes that run commands: it must require a password."""
    url = environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    if url and get(f"{url}/api/2.0/mlflow/experiments/search?max_results=1") is not None:
        remedy = "start it as `ddpm up` and infra/docker/compose.yaml do, with users and passwords"
        return Finding("mlflow login", False, f"{url} does not require a password", remedy)
    return Finding("mlflow login", True, "required" if url else "no server to check")


def check_ray_cluster(environ: Environ = os.environ) -> Finding:
    """Whether the cluster answers, accepts our token, and is of our version."""
    url = dashboard_address(environ)
    if not url:
        remedy = "start the local stack (ddpm up), or name your cluster's dashboard"
        return Finding("ray", False, "RAY_JOB_ADDRESS is not set", remedy)
    try:
        check_ray(environ)
    except UserError as error:
        return refused("ray", error)
    theirs = str(ask("/api/version", environ).get("ray_version", ""))
    ours = metadata.version("ray")
    if theirs and theirs != ours:
        remedy = f"run the cluster's image with Ray {ours}, or install ray=={theirs} here"
        return Finding("ray", False, f"{url} runs {theirs}, here is {ours}", remedy)
    nodes = ask("/nodes?view=summary", environ).get("data", {}).get("summary", [])
    alive = sum(node.get("raylet", {}).get("state") == "ALIVE" for node in nodes)
    if alive == 0:
        return Finding("ray", False, f"{url}: no node is alive", "look at the head's log (ddpm status)")
    found = f"{url} runs {theirs}, {alive} node{'s' * (alive != 1)} alive"
    if (urlsplit(url).hostname or "").startswith("127."):
        return Finding("ray", True, found)
    return Finding("ray", True, found, STOP_ADVICE)


def check_ray_token(environ: Environ = os.environ) -> Finding:
    """Ray runs code for any client: a token must be required, and only its owner may read the file."""
    url = dashboard_address(environ)
    token = get(f"{url}/api/version") if url else None
    if token is not None:
        remedy = "set RAY_AUTH_MODE=token on head, nodes and clients, and restart the cluster"
        return Finding("ray token", False, f"{url} does not require a token", remedy)
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or "")
    if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        return Finding("ray token", False, f"{path} can be read by others", f"chmod 600 {path}")
    return Finding("ray token", True, "required, and private" if url else "no cluster to check")


def check_clock(environ: Environ = os.environ) -> Finding:
    """This machine's clock against the services' (the Date of their answers, exact to a second)."""
    for name in ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "RAY_JOB_ADDRESS"):
        url = environ.get(name)
        theirs = _date_of(url) if url else None
        if theirs is None:
            continue
        skew = time.time() - theirs
        if abs(skew) > MAX_CLOCK_SKEW_SECONDS:
            late = "ahead of" if skew > 0 else "behind"
            remedy = "switch time synchronisation on (timedatectl set-ntp true)"
            return Finding("clock", False, f"{abs(skew):.0f} s {late} {_host(url or '')}", remedy)
        return Finding("clock", True, f"within {max(2.0, abs(skew)):.0f} s of {_host(url or '')}")
    return Finding("clock", True, "no service reports the time; not compared")


def check_disk(folder: Path | None = None) -> Finding:
    """Room where Ray spills and models are unpacked."""
    place = folder or Path(tempfile.gettempdir())
    usage = shutil.disk_usage(place)
    found = f"{usage.free / 2**30:.1f} GiB free under {place} ({usage.used / usage.total:.0%} used)"
    if usage.free < MIN_FREE_BYTES or usage.used / usage.total > MAX_USED_SHARE:
        remedy = "make room, or set TMPDIR to a larger disk; Ray stops working at 95%"
        return Finding("disk", False, found, remedy)
    return Finding("disk", True, found)


def check_shm(folder: Path = Path("/dev/shm")) -> Finding:
    """Shared memory, through which Ray and data loaders pass arrays."""
    if not folder.is_dir():
        return Finding("shared memory", True, "not of this system")
    total = shutil.disk_usage(folder).total
    found = f"{total / 2**30:.2f} GiB in {folder}"
    if total < MIN_SHM_BYTES:
        remedy = "docker: --shm-size=2g; Kubernetes: mount an emptyDir with medium: Memory at /dev/shm"
        return Finding("shared memory", False, found, remedy)
    return Finding("shared memory", True, found)


def all_checks(write: bool = False) -> Iterator[Callable[[], Finding | list[Finding]]]:
    """Every check, the cheap and local ones first; some find several things."""
    yield check_packages
    yield check_disk
    yield check_shm
    yield check_gpus
    yield check_credentials
    yield lambda: check_bucket(write=write)
    yield check_mlflow
    yield lambda: check_mlflow_artifacts(write=write)
    yield check_mlflow_password
    yield check_ray_cluster
    yield check_ray_token
    yield check_cluster_gpus
    yield check_clock


def _difference(pin: Requirement) -> str | None:
    """How an installed package differs from its pin; None when it does not."""
    wanted = next(iter(pin.specifier)).version
    found = _version(pin.name)
    if found is None:
        return f"{pin.name} {wanted} is missing"
    return None if found == wanted else f"{pin.name} is {found}, pinned is {wanted}"


def _unmet(need: Requirement) -> str | None:
    """How an installed package fails a requirement; None when it does not, or when it is not needed here."""
    if need.marker is not None and not need.marker.evaluate({"extra": ""}):
        return None
    found = _version(need.name)
    if found is None:
        return f"{need.name} is missing"
    return (
        None
        if need.specifier.contains(found, prereleases=True)
        else f"{need.name} is {found}, needed is {need.specifier}"
    )


def _version(package: str) -> str | None:
    """The installed version without its build's label, such as +cpu; None where it is not installed."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def _some(faults: Sequence[str]) -> str:
    """The first three, and the number of the others."""
    more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
    return "; ".join(faults[:3]) + more


def _date_of(url: str) -> float | None:
    """The Date header of any answer, also of a refusal, in seconds since 1970."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_SECONDS) as answer:
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as refusal:
        date = refusal.headers.get("Date")
    except (urllib.error.URLError, OSError, ValueError):
        return None
    return email.utils.parsedate_to_datetime(date).timestamp() if date else None


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]
