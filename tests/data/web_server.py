"""A web server of files that behaves badly on purpose."""

import hashlib
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

from tests.loopback_server import running


@dataclass
class Site:
    """Files by path, and what is done to those who ask for them."""

    files: dict[str, bytes]
    redirects: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    """Sent with every file, over the usual ones."""
    cut: Callable[[int], int] = lambda size: size
    """From the bytes due to the bytes sent before the connection is cut."""
    sends_ranges: bool = True
    sends_size: bool = True
    sends_tag: bool = True
    busy: int = 0
    """How many requests are answered 503 first."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Path and Range of each."""
    seen_headers: list[dict[str, str]] = field(default_factory=list)

    def etag(self, path: str) -> str:
        return f'"{hashlib.sha256(self.files[path]).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    site: Site
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        site, path = self.site, unquote(self.path.partition("?")[0])
        site.requests.append((path, self.headers.get("Range", "")))
        site.seen_headers.append(dict(self.headers.items()))
        if site.busy:
            site.busy -= 1
            self._answer(503, {"Content-Length": "0"})
        elif path in site.redirects:
            self._answer(302, {"Content-Length": "0", "Location": site.redirects[path]})
        elif path not in site.files:
            self._answer(404, {"Content-Length": "0"})
        else:
            self._send(site.files[path], site.etag(path))

    def _send(self, data: bytes, etag: str) -> None:
        site = self.site
        range_ = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        is_part = range_ is not None and site.sends_ranges and self.headers.get("If-Range", etag) == etag
        start = int(range_[1]) if range_ is not None and is_part else 0
        body = data[start:]
        headers = {"Content-Type": "application/octet-stream"} | ({"ETag": etag} if site.sends_tag else {})
        if is_part:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        headers |= {"Content-Length": str(len(body))} if site.sends_size else {"Transfer-Encoding": "chunked"}
        self._answer(206 if is_part else 200, headers | site.headers)
        sent = site.cut(len(body))
        if site.sends_size:
            self.wfile.write(body[:sent])
        else:
            self.wfile.write(
                b"%x\r\n%s\r\n" % (sent, body[:sent]) + (b"0\r\n\r\n" if sent == len(body) else b"")
            )
        if sent < len(body):
            self.close_connection = True

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def serving(site: Site) -> Generator[str]:
    """The address of a running server of this site, without a last slash."""
    with running(type("Handler", (_Handler,), {"site": site})) as address:
        yield address
