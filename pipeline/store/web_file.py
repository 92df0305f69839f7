"""A file at an http:// or https:// address, read by ranges of one version."""

from __future__ import annotations

import io
import ipaddress
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from functools import partial
from typing import Any, TypeVar
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

import requests
import requests.exceptions as web_errors
import urllib3.exceptions
from requests.auth import AuthBase, HTTPBasicAuth

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.retry import RetryPolicy, call_with_retries
from ddpm_pipeline.store.interface import ObjectChanged, StoreUnreachable
from ddpm_pipeline.store.stream import ResumingStream

T = TypeVar("T")
POLICY, PROBE_POLICY = RetryPolicy(), RetryPolicy(attempts=2)  # a person waits for the first answer
CONNECT_SECONDS, READ_SECONDS = 10, 60
MAX_REDIRECTS = 5
_MOVED = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")
_SIZE = re.compile(r"\d{1,18}")
_LOST = (web_errors.RequestException, urllib3.exceptions.HTTPError, OSError)
_REMEDIES = {
    401: "it needs a user and password: write them into the address",
    403: "it refuses access; check the address, and whether it has expired",
    404: "there is no such file; check the address",
    410: "the file is gone; look for another address",
    451: "it may not be served here",
}


@dataclass(frozen=True)
class WebFileInfo:
    """What a server says about a file."""

    size_bytes: int | None
    """None if it does not say."""
    tag: str
    """Its strong ETag, else the time it was changed: what names this version. Empty if it has neither."""
    names: tuple[str, ...]
    """What it may be called: the last part of the address, of the address it redirects to, and what the server says."""


class WebFile:
    """A file at an http:// or https:// address.

    Redirects are followed to http and https only, never from https to http, and not from one host to another that has
    a private address: a public server could otherwise make this machine ask servers that only it reaches. Credentials
    in the address go to its own host only; those in ~/.netrc are not used.
    """

    def __init__(self, url: str, *, policy: RetryPolicy = POLICY) -> None:
        """Contacts nothing. Raises UserError for an address that is none."""
        self.url, self.policy = url, policy
        self._parts = _split(url)
        self.where = without_secrets(url)
        self._session = requests.Session()

    def stat(self) -> WebFileInfo:
        """Size, tag and names, by a request whose body is not read."""

        def ask() -> WebFileInfo:
            response = self._get({})
            with response:
                return self._info(response)

        return call_with_retries(partial(self._explained, ask), _may_retry, PROBE_POLICY)

    def open(self, start: int, info: WebFileInfo) -> io.RawIOBase:
        """A stream of the bytes of this version from `start`; it resumes over broken connections.

        Without a size the server cannot resume, so `start` must be 0. Raises ObjectChanged, now or while reading, when
        the file was replaced, and when the server does not send parts of files.
        """
        if info.size_bytes is None:
            return _UnsizedStream(self._explained(partial(self._get, {})), self._explained)
        return ResumingStream(
            partial(self._open_range, info), self.policy, _may_retry, self._explained, start
        )

    def _open_range(self, info: WebFileInfo, position: int) -> tuple[_Body, int]:
        size = info.size_bytes or 0
        if position == size:
            return _Body(io.BytesIO()), size
        headers = {"Range": f"bytes={position}-"} if position else {}
        response = self._get(headers | ({"If-Range": info.tag} if position and info.tag else {}))
        try:
            found = self._info(response)
            if position and response.status_code != 206:
                raise ObjectChanged(
                    f"{self.where}: cannot be resumed; it was replaced, or is sent as a whole only"
                )
            if (found.size_bytes, found.tag) != (size, info.tag):
                raise ObjectChanged(f"{self.where}: replaced while it was being read")
            if response.status_code == 206 and _range_start(response) != position:
                raise ObjectChanged(f"{self.where}: sends another part than byte {position} on")
        except BaseException:
            response.close()
            raise
        return _Body(response.raw, response.close), size

    def _get(self, headers: dict[str, str]) -> requests.Response:
        """The answer at the end of the redirects, its body unread. Raises UserError for a refusal."""
        url = self.url
        for _ in range(MAX_REDIRECTS + 1):
            response = self._session.get(
                url,
                # Without compression: lengths and ranges are those of the file.
                headers={"Accept-Encoding": "identity", **headers},
                stream=True,
                allow_redirects=False,
                timeout=(CONNECT_SECONDS, READ_SECONDS),
                auth=self._auth(url),
            )
            place = response.headers.get("location")
            if response.status_code not in _MOVED or place is None:
                self._require_file(response)
                return response
            response.close()
            url = self._redirected(url, place)
        raise UserError(f"{self.where}: redirects more than {MAX_REDIRECTS} times; give the final address")

    def _redirected(self, url: str, place: str) -> str:
        target = urljoin(url, place)
        parts = _split(target)
        if urlsplit(url).scheme == "https" and parts.scheme == "http":
            raise UserError(
                f"{self.where}: redirects from https to http ({parts.hostname}); name that address itself"
            )
        if parts.hostname != self._parts.hostname and _is_private(parts):
            raise UserError(
                f"{self.where}: redirects to {parts.hostname}, which has a private address; name that address itself"
            )
        return target

    def _auth(self, url: str) -> AuthBase:
        own = urlsplit(url).netloc.rpartition("@")[2] == self._parts.netloc.rpartition("@")[2]
        if self._parts.username is None or not own:
            return _NoAuth()
        return HTTPBasicAuth(unquote(self._parts.username), unquote(self._parts.password or ""))

    def _require_file(self, response: requests.Response) -> None:
        """Raise for an answer that is no file."""
        status = response.status_code
        kind = response.headers.get("content-type", "")
        if status in (200, 206) and not kind.startswith("text/html"):
            return
        response.close()
        if status in _BUSY or status >= 500:
            raise StoreUnreachable(f"{self.where}: the server answers {status}; try again later")
        if status == 416:
            raise ObjectChanged(f"{self.where}: is shorter than before")
        if status in (200, 206):
            raise UserError(f"{self.where}: answers with a web page, not a file; look at it in a browser")
        remedy = _REMEDIES.get(status, "check the address")
        raise UserError(f"{self.where}: the server answers {status}; {remedy}")

    def _info(self, response: requests.Response) -> WebFileInfo:
        headers = response.headers
        etag = headers.get("etag", "")
        tag = headers.get("last-modified", "") if not etag or etag.startswith("W/") else etag
        length = _SIZE.fullmatch(headers.get("content-length", ""))
        size = None if length is None else int(length[0])
        if response.status_code == 206:
            whole = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
            size = None if whole is None else int(whole[2])
        if size is None and headers.get("transfer-encoding", "").lower() != "chunked":
            raise UserError(
                f"{self.where}: the server does not say where the file ends; download it yourself"
            )
        said = Message()
        said["content-disposition"] = headers.get("content-disposition", "")
        names = (_last_part(self.url), _last_part(response.url or ""), said.get_filename() or "")
        return WebFileInfo(size, tag, tuple(name for name in names if name))

    def _explained(self, action: Callable[[], T]) -> T:
        """`action()`, with the errors of the transport translated; they may hold the address with its secrets."""
        try:
            return action()
        except (UserError, ObjectChanged):
            raise
        except web_errors.SSLError as error:
            raise UserError(
                f"{self.where}: no trusted connection ({_kind(error)}); check the address, or set REQUESTS_CA_BUNDLE"
            ) from None
        except (web_errors.InvalidURL, web_errors.InvalidSchema, urllib3.exceptions.LocationValueError):
            raise UserError(f"{self.where}: not an address; check it") from None
        except _LOST as error:
            raise StoreUnreachable(
                f"{self.where}: cannot be reached, or stopped answering ({_kind(error)}); check the address and the "
                "network"
            ) from None


class _Body:
    """The body of an answer; `read` returns what has arrived."""

    def __init__(self, raw: Any, close: Callable[[], None] = lambda: None) -> None:
        self._raw, self.close = raw, close

    def read(self, amt: int) -> bytes:
        if isinstance(self._raw, io.BytesIO):
            return self._raw.read(amt)
        return self._raw.read1(amt, decode_content=False)


class _UnsizedStream(io.RawIOBase):
    """A body whose size nobody said. Its end is marked, so a cut one is an error; it cannot be resumed."""

    def __init__(
        self, response: requests.Response, explained: Callable[[Callable[[], bytes]], bytes]
    ) -> None:
        super().__init__()
        self._response, self._body, self._explained = response, _Body(response.raw), explained

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self._explained(lambda: self._body.read(len(view)))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._response.close()
        super().close()


class _NoAuth(AuthBase):
    """Sends nothing, and keeps requests from looking into ~/.netrc."""

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        return r


def without_secrets(url: str) -> str:
    """The address without user, password, query and fragment: presigned addresses hold their key in the query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for one that is no number
    except ValueError as error:
        raise UserError(f"{url.partition('?')[0][:200]}: not an address ({error}); check it") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"{url.partition('?')[0][:200]}: leads to the scheme {parts.scheme!r}; only http and https are followed"
        )
    return parts


def _is_private(parts: SplitResult) -> bool:
    """Whether a host has an address that is not public: loopback, a private network, link-local."""
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or parts.scheme, type=socket.SOCK_STREAM)
    except OSError:
        return False  # the request fails too, or a proxy knows the host
    addresses = (ipaddress.ip_address(str(one[4][0]).partition("%")[0]) for one in found)
    return any(not (getattr(address, "ipv4_mapped", None) or address).is_global for address in addresses)


def _last_part(url: str) -> str:
    return unquote(urlsplit(url).path.rstrip("/").rpartition("/")[2])


def _range_start(response: requests.Response) -> int | None:
    found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    return None if found is None else int(found[1])


def _kind(error: Exception) -> str:
    """The kind of failure, without the address that its message holds."""
    inner = error.args[0] if error.args else error
    reason = getattr(inner, "reason", None)
    return type(reason if isinstance(reason, Exception) else error).__name__


def _may_retry(error: Exception) -> bool:
    return isinstance(error, StoreUnreachable)
