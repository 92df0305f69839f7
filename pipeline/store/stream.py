"""A stream over HTTP ranges that resumes after the last byte received."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from ddpm_pipeline.retry import Retries, RetryPolicy
from ddpm_pipeline.telemetry.counters import increment

READ_ALL_CHUNK_BYTES = 1 << 20  # io's own is 8 KiB: a hundred times the calls


class Body(Protocol):
    """The body of a range request: bytes until the range ends or the connection breaks."""

    def read(self, amt: int) -> bytes: ...
    def close(self) -> None: ...


OpenRange = Callable[[int], tuple[Body, int]]
"""From a start offset: the body, and the offset at which the whole read ends. All ranges are of one version."""


class ResumingStream(io.RawIOBase):
    """Reads one version of an object to its end over broken connections.

    A body that breaks, or ends early, is requested again from the next missing byte. The retry limit is for failures
    in a row: any received byte resets it, so a server that cuts every connection only slows the read, and one that
    sends nothing ends it after `policy.attempts`. `explain` runs an action and translates the transport's errors;
    `may_retry` gets the translated ones.
    """

    def __init__(
        self,
        open_range: OpenRange,
        policy: RetryPolicy,
        may_retry: Callable[[Exception], bool],
        explain: Callable[[Callable[[], bytes]], bytes],
        start: int = 0,
    ) -> None:
        super().__init__()
        self._open_range = open_range
        self._retries = Retries(policy, lambda error, left: increment("store_retries"))
        self._may_retry, self._explain = may_retry, explain
        self._position = start
        self._body: Body | None = None
        self._end: int | None = None
        self._attempt(self._ensure_body)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        if not len(view):
            return 0
        data = self._attempt(lambda: self._some(len(view)))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        chunks: list[bytes] = []
        while chunk := self._attempt(lambda: self._some(READ_ALL_CHUNK_BYTES)):
            chunks.append(chunk)
        return b"".join(chunks)

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._drop_body()
        super().close()

    def _ensure_body(self) -> bytes:
        if self._body is None and (self._end is None or self._position < self._end):
            self._body, self._end = self._open_range(self._position)
        return b""

    def _some(self, limit: int) -> bytes:
        """At least one byte, or b'' at the true end of the object."""
        self._ensure_body()
        if self._body is None or self._end is None or self._position >= self._end:
            return b""
        data = self._body.read(min(limit, self._end - self._position))
        if not data:
            raise ConnectionError(f"the connection ended at byte {self._position} of {self._end}")
        self._position += len(data)
        self._retries.reset()
        return data

    def _attempt(self, action: Callable[[], bytes]) -> bytes:
        while True:
            try:
                return self._explain(action)
            except Exception as error:
                self._drop_body()
                if not self._may_retry(error) or not self._retries.pause(error):
                    raise

    def _drop_body(self) -> None:
        if self._body is not None:
            with suppress(Exception):  # the connection is abandoned: an error while closing does not matter
                self._body.close()
            self._body = None
