"""Joining a Ray cluster as a driver.

Ray reads its way of authentication when it is imported. Jobs therefore import it inside functions only, after the
local stack's variables have been set.
"""

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from infra.local import check_ray
from jobs.lost import noticing_loss
from pipeline.errors import UserError
from pipeline.logs import FORM_VARIABLE, as_json
from pipeline.patience import START_VARIABLE, patiently, start_seconds

log = logging.getLogger(__name__)

PROXY_VARIABLES = tuple(
    spelt for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY") for spelt in (name, name.lower())
)
# What workers must know to reach the same services. No keys: Ray shows a job's settings to whoever sees the
# dashboard, so a cluster's nodes have keys of their own (the local stack's head does).
SHARED_VARIABLES = (
    "AWS_CA_BUNDLE",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "DDPM_ROOT",
    FORM_VARIABLE,
    "GLOO_SOCKET_IFNAME",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_TRACKING_URI",
    "NCCL_SOCKET_IFNAME",
    "REQUESTS_CA_BUNDLE",
    START_VARIABLE,
    *PROXY_VARIABLES,
)


SUBMITTED = "DDPM_SUBMITTED_AS"  # the name of a job that `ddpm submit` started


@contextmanager
def ray_cluster() -> Generator[None]:
    """Connected to the cluster that RAY_ADDRESS names. Raises UserError when it cannot be reached."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise UserError(
            "RAY_ADDRESS: not set; start the local stack with `ddpm up`, or name your cluster, as host:port"
        )
    patiently(check_ray, start_seconds())
    import ray

    try:
        ray.init(
            address=address,
            runtime_env=_environment(),
            logging_level=logging.WARNING,
            # workers' lines would come with Ray's own prefix; as JSON they lie in Ray's log folder on each node
            log_to_driver=not as_json(),
        )
    except (ConnectionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"RAY_ADDRESS {address}: cannot be joined ({reason}); is the cluster up?") from None
    here = ray.get_runtime_context().get_node_id()
    try:
        with noticing_loss(lambda: any(node["NodeID"] == here and node["Alive"] for node in ray.nodes())):
            yield
    finally:
        ray.shutdown()


def shared_variables() -> dict[str, str]:
    """Where the services are, as far as this process knows, be it from a variable or from its AWS config.

    An address that holds a password is left out, and that is said.
    """
    found = {name: os.environ[name] for name in SHARED_VARIABLES if name in os.environ}
    with suppress(UserError):  # settings of S3 that cannot be used: who needs it says so
        from pipeline.store.s3_client import whereabouts  # boto3 takes a quarter of a second to import

        found |= whereabouts()
    for name in [name for name, value in found.items() if "@" in urlsplit(value).netloc]:
        log.warning("%s holds a password, which Ray would show: not handed on, so set it on the nodes", name)
        del found[name]
    return found


def _environment() -> dict[str, Any] | None:
    """What a driver adds to its workers' environment; a submitted job has been given it already."""
    return None if SUBMITTED in os.environ else {"env_vars": shared_variables()}


def require_resources(num_workers: int, cpus_each: float, gpus_each: float, section: str) -> None:
    """Refuse a request that the cluster, as it stands, could never fill; an autoscaling one is trusted to grow."""
    import ray

    from pipeline.generate.cluster import GROWS_VARIABLE

    have = ray.cluster_resources()
    for kind, each in (("CPU", cpus_each), ("GPU", gpus_each)):
        need = num_workers * each
        if need > have.get(kind, 0.0) and not os.environ.get(GROWS_VARIABLE):
            raise UserError(
                f"{section}.num_workers: {num_workers} workers need {need:g} {kind}s, the cluster has "
                f"{have.get(kind, 0.0):g}; ask for fewer, or set {GROWS_VARIABLE}=1 if it scales by itself"
            )
