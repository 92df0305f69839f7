"""Reaching the tracking server: checked quickly before work, patiently during it."""

import os
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from pipeline.errors import UserError
from pipeline.track.redaction import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

# Waiting is done here and in the spool, where it can be bounded and shown, not inside one HTTP call (whose
# defaults hold a caller for minutes). All of them can be overruled from outside.
_CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class TrackingError(Exception):
    """The tracking server stayed away, or refused, after work had begun."""


def configure_client() -> None:
    """Set what rules MLflow's client in this process; values already in the environment stay."""
    for name, value in _CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def tracking_uri(uri: str | None = None) -> str:
    """`uri`, or MLFLOW_TRACKING_URI, without a trailing slash; UserError when there is none or it is no http
    URL.
    """
    found = (uri or os.environ.get("MLFLOW_TRACKING_URI", "")).strip().rstrip("/")
    if not found:
        raise UserError(
            "MLFLOW_TRACKING_URI is not set: start the local stack (ddpm up) or name your MLflow server"
        )
    parts = urlsplit(found)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"MLFLOW_TRACKING_URI={redact(found)}: not an http(s) address; name a running MLflow server"
        )
    if parts.username or parts.password:
        raise UserError(
            f"MLFLOW_TRACKING_URI={redact(found)}: holds a password, which would end up in logs; "
            "move them to MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return found


def require_server(uri: str | None = None, timeout_seconds: float = 5.0) -> str:
    """Return the server's address once it has answered and accepted our credentials.

    Raises UserError, within about twice `timeout_seconds`, when it is unset, unreachable, unwell or refusing.
    """
    import requests

    found = tracking_uri(uri)
    try:
        health = requests.get(f"{found}/health", timeout=timeout_seconds, verify=_verify())
        _require_ok(found, health.status_code, "/health")
        answer = requests.get(
            f"{found}/api/2.0/mlflow/experiments/search",
            params={"max_results": 1},
            headers=_authorization(),
            timeout=timeout_seconds,
            verify=_verify(),
        )
    except requests.RequestException as error:
        raise UserError(
            f"MLflow at {found}: no answer ({_brief(error)}); is the server up? (ddpm up)"
        ) from None
    _require_ok(found, answer.status_code, "a search")
    if "json" not in answer.headers.get("Content-Type", ""):
        raise UserError(f"MLflow at {found}: answers, but is no MLflow server; check MLFLOW_TRACKING_URI")
    return found


def tracking_client(uri: str | None = None) -> "MlflowClient":
    """A client of the server at `uri` (or MLFLOW_TRACKING_URI) for runs, artifacts and the registry alike."""
    found = tracking_uri(uri)
    configure_client()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=found, registry_uri=found)


def is_outage(error: BaseException) -> bool:
    """Whether waiting may help: the server is away, overloaded, restarting, or does not know us for now."""
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.get_http_status_code() in (401, 403, 408, 429) or error.get_http_status_code() >= 500
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code in (401, 403, 408, 429) or error.response.status_code >= 500
    return isinstance(error, (requests.RequestException, ConnectionError, TimeoutError))


def patiently(what: str, action: Callable[[], T], wait_seconds: float = 60.0) -> T:
    """`action()`, tried again with growing pauses while the server is away; it must be idempotent.

    Raises TrackingError, naming `what`, when the server stayed away for `wait_seconds`.
    """
    deadline, pause = time.monotonic() + wait_seconds, 0.5
    while True:
        try:
            return action()
        except Exception as error:
            if not is_outage(error):
                raise
            if time.monotonic() + pause > deadline:
                raise TrackingError(
                    f"{what}: MLflow stayed away for {wait_seconds:.0f} s ({_brief(error)})"
                ) from error
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(pause * 2, 10.0)


def _require_ok(uri: str, status: int, what: str) -> None:
    if status in (401, 403):
        raise UserError(
            f"MLflow at {uri}: refuses {what} with {status}; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), or add this host to its --allowed-hosts"
        )
    if status != 200:
        raise UserError(f"MLflow at {uri}: answers {what} with {status}; look at the server's log")


def _authorization() -> dict[str, str]:
    """Headers for the credentials that MLflow's own client takes from the environment."""
    import base64

    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _verify() -> bool | str:
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true"):
        return False
    return os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True


def _brief(error: BaseException) -> str:
    """The innermost reason of a failed call in a few words, without addresses of Python objects."""
    text = redact(str(error)).splitlines()[0] if str(error) else type(error).__name__
    for reason in ("Connection refused", "timed out", "Name or service not known", "Connection reset"):
        if reason.lower() in text.lower():
            return reason.lower()
    return text[:160]
