"""An S3 endpoint that behaves badly on purpose."""

import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from tests.loopback_server import running


@dataclass
class Hostile:
    """One object's versions, and what to do to those who ask for it."""

    versions: list[bytes]
    cut: Callable[[int], int] = lambda size: size
    """From the bytes due to the bytes sent before the connection is cut."""
    failures_first: int = 0
    """How many requests are answered 503 SlowDown before each success."""
    swap_after: int | None = None
    """After how many good answers the next version takes the object's place."""
    requests: list[str] = field(default_factory=list)
    answered: int = 0
    refused: int = 0

    @property
    def data(self) -> bytes:
        swapped = self.swap_after is not None and self.answered >= self.swap_after
        return self.versions[1 if swapped else 0]

    @property
    def etag(self) -> str:
        return f'"v{self.versions.index(self.data)}"'


class _Handler(BaseHTTPRequestHandler):
    hostile: Hostile
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hostile = self.hostile
        hostile.requests.append(self.headers.get("Range", ""))
        if hostile.refused < hostile.failures_first:
            hostile.refused += 1
            return self._error(503, "SlowDown")
        hostile.refused = 0
        wanted = self.headers.get("If-Match")
        if wanted is not None and wanted != hostile.etag:
            return self._error(412, "PreconditionFailed")
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        stop = int(match[2]) + 1 if match and match[2] else len(hostile.data)
        body = hostile.data[start:stop]
        self.send_response(206)
        self.send_header("ETag", hostile.etag)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(hostile.data)}")
        self.end_headers()
        sent = hostile.cut(len(body))
        hostile.answered += 1
        self.wfile.write(body[:sent])
        if sent < len(body):
            self.close_connection = True
        return None

    def _error(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def serving(hostile: Hostile) -> Iterator[str]:
    """Its address, while it runs."""
    with running(type("Handler", (_Handler,), {"hostile": hostile})) as address:
        yield address


@dataclass(frozen=True)
class Answer:
    """What is answered to a request, whatever it is; a HEAD is given no body."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What was asked, with the headers' names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def of_code(status: int, code: str, more: str = "") -> Answer:
    """A refusal as S3 writes it."""
    body = f"<Error><Code>{code}</Code><Message>because</Message>{more}</Error>"
    return Answer(status, body.encode(), {"Content-Type": "application/xml"})


class _Answering(BaseHTTPRequestHandler):
    answer: Callable[[Request], Answer]
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = type(self).answer(Request(self.command, self.path, headers, body))
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815 - names of http.server

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def answering(answer: Callable[[Request], Answer]) -> Iterator[str]:
    """The address of an endpoint that answers as it is told to, while it runs."""
    with running(type("Handler", (_Answering,), {"answer": staticmethod(answer)})) as address:
        yield address


def cut_at_random(seed: int, most: int) -> Callable[[int], int]:
    """Sends from one to `most` bytes, then cuts."""
    source = random.Random(seed)
    return lambda size: min(size, source.randint(1, most))


@contextmanager
def breaking_off(times: int) -> Iterator[tuple[str, list[bytes]]]:
    """An endpoint that breaks off within its first lines so many times, and takes every object from then on.

    Its address, and the requests it has read, without their bodies.
    """
    requests: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                with closing(client), client.makefile("rb") as lines:
                    head = b"".join(iter(lines.readline, b"\r\n"))
                    requests.append(head)
                    if len(requests) <= times:
                        client.sendall(b"HTTP/1.1 100 Continue\r\n")
                        continue
                    length = re.search(rb"content-length: (\d+)", head.lower())
                    lines.read(int(length[1]) if length else 0)
                    client.sendall(
                        b'HTTP/1.1 200 OK\r\nETag: "v"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n'
                    )

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
