"""Joining a Ray cluster as a driver, noticing that it was replaced, and answering signals meanwhile.

Ray reads how to authenticate when it is imported. Jobs therefore import it inside functions only, after the local
stack's variables have been set.

When a head dies for good, Ray ends its drivers after a minute. When a new, empty cluster takes the old one's address
before that, Ray's driver joins it silently and waits forever for actors that the new cluster does not know. The
driver's own node tells the two apart: the new cluster does not list it.
"""

import ipaddress
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import psutil

from ddpm_pipeline.errors import JobError, Outage, UserError
from ddpm_pipeline.infra.local import check_ray
from ddpm_pipeline.infra.local.client_environment import cluster_variables
from ddpm_pipeline.infra.local.ray import LOOPBACK_SETTINGS
from ddpm_pipeline.infra.local.service import listens
from ddpm_pipeline.jobs.cluster_address import DRIVER_VARIABLE, settle_token
from ddpm_pipeline.jobs.runner import LOCAL
from ddpm_pipeline.jobs.staging import stage_program
from ddpm_pipeline.retry import START_VARIABLE, retry_during_outage, start_seconds
from ddpm_pipeline.store.s3_settings import may_name_s3
from ddpm_pipeline.telemetry.logs import FORM_VARIABLE, as_json
from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.telemetry.terminal import echo
from ddpm_pipeline.tracking.connect import CLIENT_DEFAULTS

log = logging.getLogger(__name__)

PROXY_VARIABLES = tuple(
    spelt for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY") for spelt in (name, name.lower())
)
# What workers must know to reach the same services. No keys: Ray shows a job's settings to everyone who sees
# the dashboard, so a cluster's nodes have keys of their own (the local stack's head does).
SHARED_VARIABLES = (
    "AWS_CA_BUNDLE",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "DDPM_CLUSTER_GROWS",
    "DDPM_ROOT",
    FORM_VARIABLE,
    "GLOO_SOCKET_IFNAME",
    "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_S3_IGNORE_TLS",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_TRACKING_URI",
    "NCCL_SOCKET_IFNAME",
    "REQUESTS_CA_BUNDLE",
    START_VARIABLE,
    *PROXY_VARIABLES,
)
ANSWER_SECONDS = 10.0
"""For the cluster's control store to list its nodes."""
_POLL_SECONDS = 3.0
_LOST_AFTER_SECONDS = 12.0
"""The driver's node must be absent for this long: the list may lag behind a node that has just joined."""
_EXIT_SECONDS = 90.0
"""For closing the run and leaving Ray, which may wait for answers that cannot come."""
CLUSTER_REPLACED = (
    "the Ray cluster was replaced while the job ran: its head died and a new one answers at the same address; "
    "run the same command again to resume from what is in the store"
)
SUBMITTED = "DDPM_SUBMITTED_AS"  # the name of a job that `ddpm submit` started
UNUSED_SERVICES = {"RAY_DATA_USAGE_DISABLED": "1", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""Actors that Ray's libraries start for what this program does not use: each is a process, two CPU seconds to start."""
PATCH_VARIABLE = "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL"
"""Ray's own: with `minor`, nodes and drivers join with another last number of Python's version too."""
_joined = threading.Event()


@contextmanager
def ray_cluster() -> Generator[None]:
    """Connected to the cluster that RAY_ADDRESS names. Raises UserError when it cannot be reached.

    Within such a block, another one shares the connection.
    """
    if _joined.is_set():
        yield
        return
    with _connection():
        _joined.set()
        try:
            yield
        finally:
            _joined.clear()


@contextmanager
def _connection() -> Generator[None]:
    address = os.environ.get(DRIVER_VARIABLE)
    if not address:
        raise UserError(
            "RAY_ADDRESS: not set; start the local stack with `ddpm up`, or name your cluster, as host:port"
        )
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS {redact(address)}: a driver joins a cluster as host:port, on one of its nodes; from "
            "elsewhere submit the job with `ddpm submit` and RAY_JOB_ADDRESS=http://HEAD:8265"
        )
    settle_token()
    retry_during_outage(check_ray, start_seconds())
    retry_during_outage(lambda: require_node(address), start_seconds())
    for name, value in UNUSED_SERVICES.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.exceptions import RayError

    try:
        with _environment(address) as runtime_env:
            ray.init(
                address=address,
                runtime_env=runtime_env,
                logging_level=logging.WARNING,
                # workers' lines would get Ray's own prefix; as JSON they stay in Ray's log folder on each node
                log_to_driver=not as_json(),
            )
    except (ConnectionError, RuntimeError, RayError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"RAY_ADDRESS {address}: cannot be joined ({reason}); {_remedy(reason)}") from None
    context = ray.get_runtime_context()
    store, here = context.gcs_address, context.get_node_id()
    try:
        with watch_cluster(lambda: any(n.node_id.hex() == here and not n.state for n in nodes_of(store))):
            yield
    finally:
        ray.shutdown()


def _remedy(reason: str) -> str:
    """What helps where Ray did not let this process join, for this reason."""
    if "Version mismatch" in reason:
        return (
            "use the cluster's versions here, or, where Python differs in its last number only, set "
            f"{PATCH_VARIABLE}=minor"
        )
    return "is the cluster up?"


def require_node(address: str) -> None:
    """UserError unless the cluster at `address` answers, takes our token, and has a node on this machine.

    A driver shares memory with its node; without one, Ray ends it after 40 s in C++ traces.
    """
    if address in ("auto", "local"):
        return  # Ray finds it on this machine, or starts it
    if not listens(f"tcp://{address}"):
        raise Outage(f"RAY_ADDRESS {address}: does not answer; is the cluster up?")
    from ray.exceptions import RayError

    try:
        nodes = nodes_of(address)
    except (RayError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"RAY_ADDRESS {address}: does not let us in ({reason})") from None
    addresses = {node.node_manager_address for node in nodes}
    if not any(_is_here(found) for found in addresses):
        raise UserError(
            f"RAY_ADDRESS {address}: this machine is no node of that cluster ({', '.join(sorted(addresses)[:3])}), and "
            "a driver must run on one; from here, use `ddpm submit` with RAY_JOB_ADDRESS=http://HEAD:8265"
        )


def nodes_of(address: str) -> list[Any]:
    """Nodes of the cluster whose control store answers at `address`, living (state 0) and dead.

    Not by ray.nodes(): where a new cluster has taken the address of the one that this process joined, it ends the
    process in C++. The other public calls need a node, or the dashboard.
    """
    from ray._raylet import GcsClient  # pyright: ignore

    nodes: dict[Any, Any] = GcsClient(address=address).get_all_node_info(timeout=ANSWER_SECONDS)
    return list(nodes.values())


def _is_here(address: str) -> bool:
    """Whether an address is one of this machine's."""
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    return address in own or ipaddress.ip_address(address).is_loopback


def shared_variables() -> dict[str, str]:
    """Where the services are, as far as this process knows, be it from a variable or from its AWS config.

    An address that holds a password is skipped with a warning.
    """
    found = {name: os.environ[name] for name in SHARED_VARIABLES if name in os.environ}
    if may_name_s3():
        with suppress(UserError):  # invalid S3 settings: reported where S3 is used
            from ddpm_pipeline.store.s3_client import location_variables  # boto3 takes a third of a second

            found |= location_variables()
    for name in [name for name, value in found.items() if "@" in urlsplit(value).netloc]:
        log.warning("%s holds a password, which Ray would show: not passed on, so set it on the nodes", name)
        del found[name]
    return found


@contextmanager
def _environment(address: str) -> Generator[dict[str, Any] | None]:
    """What a driver's workers are given: where the services are, and the program, which their machines may lack.

    None for a submitted job, which was given both already. The local stack's only machine has the program, and the
    variables with which its Ray was started.
    """
    if SUBMITTED in os.environ:
        yield None
        return
    alone = all(os.environ.get(name) == value for name, value in LOOPBACK_SETTINGS.items())
    if alone and address.startswith("127."):
        present = {**CLIENT_DEFAULTS, **cluster_variables(LOCAL, address)}
        missing = {name: value for name, value in shared_variables().items() if present.get(name) != value}
        # For a worker with variables of its own Ray starts a process that imports Ray and then becomes the worker.
        yield {"env_vars": missing} if missing else None
        return
    with tempfile.TemporaryDirectory(prefix="ddpm-driver-") as folder:
        yield {"env_vars": shared_variables(), "py_modules": [str(stage_program(Path(folder)))]}


def require_resources(
    num_workers: int,
    cpus_each: float,
    gpus_each: float,
    section: str,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Refuse a request that exceeds the present size of the cluster, or of its nodes with these labels; an autoscaling
    one is trusted to grow, in a line.
    """
    from ddpm_pipeline.cluster import GROWS_VARIABLE, described, grows, living_nodes

    nodes = [node["Resources"] for node in living_nodes(labels)]
    for kind, each in (("CPU", cpus_each), ("GPU", gpus_each)):
        need, have = num_workers * each, sum(node.get(kind, 0.0) for node in nodes)
        if need <= have:
            continue
        fault = (
            f"{section}.num_workers: {num_workers} workers need {need:g} {kind}s, {described(labels)} has "
            f"{have:g}"
        )
        if not grows():
            raise UserError(f"{fault}; request fewer, or set {GROWS_VARIABLE}=1 if it scales by itself")
        log.warning("%s now; waiting until it has added nodes", fault)


@contextmanager
def on_stop_signal(request_stop: Callable[[], None], message: str) -> Generator[None]:
    """Call `request_stop` on SIGTERM and the first Ctrl-C instead of ending, so that a job ends where it can resume.

    A second Ctrl-C ends at once. To be entered after Ray is joined, whose own handler would end the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        echo(f"{signal.Signals(number).name}: {message}", error=True)
        request_stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def watch_cluster(is_known: Callable[[], bool]) -> Generator[None]:
    """Raise JobError in the main thread once `is_known` (called in a thread) has been False for some seconds.

    Where the main thread hangs even then, the process ends with exit code 1. Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise JobError(CLUSTER_REPLACED)

    over = threading.Event()
    before = signal.signal(signal.SIGUSR1, give_up)
    thread = threading.Thread(target=_watch, args=(is_known, over), name="cluster", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGUSR1, before)


def _watch(is_known: Callable[[], bool], over: threading.Event) -> None:
    absent_since: float | None = None
    while not over.wait(_POLL_SECONDS):
        try:
            known = is_known()
        except Exception:  # noqa: BLE001  (no answer: Ray itself decides how long to retry)
            continue
        if known:
            absent_since = None
        elif absent_since is None:
            absent_since = time.monotonic()
        elif time.monotonic() - absent_since > _LOST_AFTER_SECONDS:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            if not over.wait(_EXIT_SECONDS):
                echo(f"failed: {CLUSTER_REPLACED}", error=True)
                os._exit(1)
            return
