"""One JSON document to a webhook. Its address is often its secret, so no message repeats it."""

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping

_TIMEOUT_SECONDS = 20.0


def send(address: str, content: Mapping[str, str], timeout_seconds: float = _TIMEOUT_SECONDS) -> str | None:
    """POST `content`; None when it was taken, else why not, in a few words without the address.

    Returns within `timeout_seconds`, also where the answer trickles in without end.
    """
    told: list[str | None] = []
    body = json.dumps(content).encode()
    sender = threading.Thread(target=lambda: told.append(_post(address, body, timeout_seconds)), daemon=True)
    sender.start()
    sender.join(timeout_seconds)
    return told[0] if told else f"no answer within {timeout_seconds:.0f} s"


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
        return "its address cannot be used: check for spaces and the port"
    except Exception as error:  # noqa: BLE001 - whatever an answer or an address can cause, the night goes on
        return f"no proper answer ({_kind(error)})"


def _kind(reason: str | BaseException) -> str:
    """What failed, without its message, which may hold the address."""
    return type(reason).__name__ if isinstance(reason, BaseException) else "refused"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would repeat the document as a GET elsewhere, so it counts as an answer that is no 2xx."""

    def redirect_request(self, *_args: object, **_kwargs: object) -> None:
        return None
