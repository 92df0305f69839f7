"""Connections to the tracking server: checked before work starts, retried during it."""

import base64
import os
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

from ddpm_pipeline.errors import Outage, UserError
from ddpm_pipeline.retry import RetryPolicy, call_with_retries, retry_during_outage, start_seconds
from ddpm_pipeline.telemetry.redaction import redact

if TYPE_CHECKING:
    import requests
    from mlflow import MlflowClient

_REFUSED = re.compile(
    r"API request to endpoint (\S+) failed with error code (\d+) != 200\. Response body: '(.*)'"
)
P = ParamSpec("P")
T = TypeVar("T")

REQUEST_POLICY = RetryPolicy(attempts=None, first_pause_seconds=0.5, longest_pause_seconds=10.0)
"""For one request, or one function of several, while the server is away."""

# Retries are ours, where they can be bounded and logged, not inside one HTTP call (whose defaults block a caller for
# minutes). The environment overrides all of these.
CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class TrackingError(Exception):
    """The tracking server was unreachable, or rejected a request, after work had started."""


class ArtifactsDeniedError(UserError):
    """The store of the server's artifacts, to which this process writes itself, refuses it."""


def configure_client() -> None:
    """Configure MLflow's client in this process; values already in the environment stay."""
    for name, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)


def tracking_uri(uri: str | None = None) -> str:
    """`uri`, or MLFLOW_TRACKING_URI, without a trailing slash; UserError when it is missing or not an http(s) URL."""
    found = (uri or os.environ.get("MLFLOW_TRACKING_URI", "")).strip().rstrip("/")
    if not found:
        raise UserError(
            "MLFLOW_TRACKING_URI is not set: start the local stack (ddpm up) or name your MLflow server"
        )
    try:
        parts = urlsplit(found)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # unclosed brackets, an invalid port
        parts, whole = urlsplit(""), False
    if not whole:
        raise UserError(
            f"MLFLOW_TRACKING_URI={redact(found)}: not an http(s) address; name a running MLflow server"
        )
    if parts.username or parts.password:
        raise UserError(
            f"MLFLOW_TRACKING_URI={redact(found)}: holds a password, which would end up in logs; "
            "move them to MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return found


def require_server(
    uri: str | None = None, timeout_seconds: float = 5.0, wait_seconds: float | None = None
) -> str:
    """Return the server's address once it has responded and accepted our credentials.

    Retries an unreachable server for `wait_seconds` (default: DDPM_START_WAIT_SECONDS), with six times
    `timeout_seconds` from the second attempt on. Raises Outage when it stays unreachable, and UserError for an invalid
    address or a rejected request.
    """
    found = tracking_uri(uri)
    limits = chain([timeout_seconds], repeat(6 * timeout_seconds))
    retry_during_outage(
        lambda: _ask(found, next(limits)), start_seconds() if wait_seconds is None else wait_seconds
    )
    return found


def server_version(uri: str, timeout_seconds: float = 5.0) -> str:
    """The server's version; empty if it does not report one."""
    try:
        answer = _get(f"{uri}/version", timeout_seconds)
    except UserError:
        return ""
    return answer.text.strip()[:40] if answer.status_code == 200 else ""


def experiments(uri: str, timeout_seconds: float) -> list[dict[str, Any]]:
    """The experiment that changed last, if this user may see one. Raises UserError as `require_server` does."""
    answer = _get(f"{uri}/api/2.0/mlflow/experiments/search?max_results=1", timeout_seconds)
    _require_ok(uri, answer.status_code, "a search")
    if "json" not in answer.headers.get("Content-Type", ""):
        raise UserError(f"MLflow at {uri}: answers, but is no MLflow server; check MLFLOW_TRACKING_URI")
    return answer.json().get("experiments", [])


def _ask(uri: str, timeout_seconds: float) -> None:
    _require_ok(uri, _get(f"{uri}/health", timeout_seconds).status_code, "/health")
    experiments(uri, timeout_seconds)


def _get(url: str, timeout_seconds: float) -> "requests.Response":
    """A response to a GET request with our credentials."""
    import requests

    server = f"{urlsplit(url).scheme}://{urlsplit(url).netloc}"
    try:
        return requests.get(url, headers=authorization(), timeout=timeout_seconds, verify=_verify())
    except requests.exceptions.SSLError as error:
        raise UserError(
            f"MLflow at {server}: no trust in its certificate ({brief(error)}); "
            "set MLFLOW_TRACKING_SERVER_CERT_PATH to its CA"
        ) from None
    except requests.ReadTimeout:
        raise Outage(
            f"MLflow at {server}: no answer within {timeout_seconds:g} s, it is slow or hangs; look at the server's log"
        ) from None
    except requests.RequestException as error:
        if isinstance(error, ValueError):  # an invalid address
            raise UserError(f"MLflow at {server}: {brief(error)}; correct MLFLOW_TRACKING_URI") from None
        proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
        through = f" through the proxy {redact(proxy)}, which NO_PROXY can rule out" if proxy else ""
        raise Outage(
            f"MLflow at {server}: no answer{through} ({brief(error)}); is the server up? (ddpm up)"
        ) from None
    except OSError as error:  # of requests, which looks for the certificates itself
        raise UserError(
            f"MLflow at {server}: {brief(error)}; correct MLFLOW_TRACKING_SERVER_CERT_PATH or REQUESTS_CA_BUNDLE"
        ) from None


def tracking_client(uri: str | None = None) -> "MlflowClient":
    """A client of the server at `uri` (or MLFLOW_TRACKING_URI) for runs, artifacts and the registry alike."""
    found = tracking_uri(uri)
    configure_client()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=found, registry_uri=found)


def is_outage(error: BaseException) -> bool:
    """Whether a retry may help: the server, or the store of its artifacts, is unreachable, overloaded or restarting."""
    import requests

    if isinstance(error, Outage):
        return True
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return isinstance(error, (requests.RequestException, ConnectionError, TimeoutError))


def is_denied(error: BaseException) -> bool:
    """Whether the server, or the store of its artifacts, denies access (until somebody renews the credentials)."""
    return isinstance(error, ArtifactsDeniedError) or _status(error) in (401, 403)


def retry_request(what: str, action: Callable[[], T], wait_seconds: float = 60.0) -> T:
    """`action()`, retried with growing pauses while the server is unreachable; it must be idempotent.

    Raises TrackingError, naming `what`, when the server stayed unreachable for `wait_seconds`, and UserError when it
    denies access.
    """
    try:
        return call_with_retries(action, is_outage, replace(REQUEST_POLICY, total_seconds=wait_seconds))
    except Outage as error:
        raise TrackingError(f"{what}: {error}") from error
    except UserError:
        raise
    except Exception as error:
        if is_denied(error):
            raise UserError(f"{what}: {_denial(error)}") from error
        if is_outage(error):
            raise TrackingError(
                f"{what}: MLflow stayed away for {wait_seconds:.0f} s ({brief(error)})"
            ) from error
        raise


def retry_requests(what: str, wait_seconds: float = 60.0) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: run the whole function, which must be idempotent, by `retry_request`."""

    def wrap(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def waiting(*args: P.args, **kwargs: P.kwargs) -> T:
            return retry_request(what, lambda: function(*args, **kwargs), wait_seconds)

        return waiting

    return wrap


@contextmanager
def long_transfers(timeout_seconds: int = 600) -> Generator[None]:
    """Raise the request timeout: the server receives a whole model before it stores it and responds.

    The setting is process-wide, so a spool's thread may also wait longer for a hanging server in the meantime.
    """
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = str(max(timeout_seconds, int(before or 0)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def authorization(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Headers for the credentials that MLflow's own client takes from the environment."""
    user, password = environ.get("MLFLOW_TRACKING_USERNAME"), environ.get("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    token = environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _denial(error: BaseException) -> str:
    """Who is refused what, and the remedy: another password, or a right that only the server's administrator gives."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    whom = f" to user {user!r}" if "Basic" in authorization().get("Authorization", "") else ""
    remedy = (
        "ask the server's administrator for the right to do this, or be another user by MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD"
        if _status(error) == 403
        else "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
    )
    return f"MLflow refuses it{whom} ({brief(error)}); {remedy}"


def _status(error: BaseException) -> int | None:
    """The HTTP status of a failed call, if the server responded at all."""
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return int(error.response.status_code)
    return None


def _require_ok(uri: str, status: int, what: str) -> None:
    if status in (401, 403):
        raise UserError(
            f"MLflow at {uri}: refuses {what} with {status}; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), or add this host to its --allowed-hosts"
        )
    if status == 429 or status >= 500:
        raise Outage(f"MLflow at {uri}: answers {what} with {status}; look at the server's log")
    if status != 200:
        raise UserError(f"MLflow at {uri}: answers {what} with {status}; look at the server's log")


def _verify() -> bool | str:
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true"):
        return False
    return os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True


def brief(error: BaseException) -> str:
    """The innermost reason of a failed call, briefly, without addresses of Python objects."""
    text = redact(str(error)).splitlines()[0] if str(error) else type(error).__name__
    text = _REFUSED.sub(r"\2 \3 for \1", text)
    for reason in (
        "Connection refused",
        "timed out",
        "Name or service not known",
        "Connection reset",
        "Remote end closed connection",
    ):
        if reason.lower() in text.lower():
            return reason.lower()
    return text[:160]
