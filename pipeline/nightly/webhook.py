"""Sends a JSON document to a webhook. Its URL is often a secret, so no message repeats it."""

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping

_TIMEOUT_SECONDS = 20.0


def send(address: str, content: Mapping[str, str], timeout_seconds: float = _TIMEOUT_SECONDS) -> str | None:
    """POST `content`; None on success, else the reason in a few words, without the URL.

    Returns within `timeout_seconds`, even if the answer never ends.
    """
    outcome: list[str | None] = []
    body = json.dumps(content).encode()
    sender = threading.Thread(
        target=lambda: outcome.append(_post(address, body, timeout_seconds)), daemon=True
    )
    sender.start()
    sender.join(timeout_seconds)
    return outcome[0] if outcome else f"no answer within {timeout_seconds:.0f} s"


def _post(address: str, body: bytes, timeout_seconds: float) -> str | None:
    try:
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout_seconds):
            return None
    except urllib.error.HTTPError as error:
        error.close()
        return f"it answered {error.code}"
    except urllib.error.URLError as error:
        return f"no connection ({_kind(error.reason)})"
    except http.client.InvalidURL:
        return "its URL cannot be used: check for spaces and the port"
    except Exception as error:  # noqa: BLE001 - no answer and no URL may end the night
        return f"no valid answer ({_kind(error)})"


def _kind(reason: str | BaseException) -> str:
    """The kind of a failure, without its message, which may contain the URL."""
    return type(reason).__name__ if isinstance(reason, BaseException) else "refused"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would become a GET elsewhere, so it counts as a failure."""

    def redirect_request(self, *_args: object, **_kwargs: object) -> None:
        return None
