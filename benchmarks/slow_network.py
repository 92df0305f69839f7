"""A slow network in front of a server on this machine: `python -m benchmarks.slow_network PORT LATENCY_MS [MB/S]`.

A relay in a process of its own. The first byte of each answer comes LATENCY_MS later, and each direction carries at
most so many megabytes a second (64 unless told otherwise), shared by all connections. It prints its own port, and
ends with its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Generator
from urllib.parse import urlsplit

MEGABYTES_PER_SECOND = 64.0
CHUNK_BYTES = 64 << 10
LATE_SECONDS = 0.02


@contextlib.contextmanager
def slow_network(
    endpoint: str, latency_ms: float, megabytes_per_second: float = MEGABYTES_PER_SECOND
) -> Generator[str]:
    """The address of a relay to `endpoint`, an http:// address on this machine; it ends with the block."""
    port = urlsplit(endpoint).port or 80
    words = [str(port), str(latency_ms), str(megabytes_per_second)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.slow_network", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


class Link:
    """One direction: bytes leave one after the other, at a fixed rate."""

    def __init__(self, bytes_per_second: float) -> None:
        self._seconds_per_byte = 1 / bytes_per_second
        self._free_at = 0.0

    async def carry(self, num_bytes: int) -> None:
        """Return when so many bytes have passed."""
        now = asyncio.get_running_loop().time()
        # Waking up late must not lower the rate.
        self._free_at = max(now - LATE_SECONDS, self._free_at) + num_bytes * self._seconds_per_byte
        await asyncio.sleep(self._free_at - now)


class Connection:
    """Forwards between a client and the server."""

    def __init__(self, latency_seconds: float) -> None:
        self._latency_seconds = latency_seconds
        self._asked = False
        """Whether the client has sent something since the last answer began."""

    async def ask(self, client: asyncio.StreamReader, server: asyncio.StreamWriter, link: Link) -> None:
        """Forward what the client sends, to its end."""
        while data := await client.read(CHUNK_BYTES):
            self._asked = True
            await _send(data, server, link)
        server.write_eof()

    async def answer(self, server: asyncio.StreamReader, client: asyncio.StreamWriter, link: Link) -> None:
        """Forward what the server sends, to its end."""
        while data := await server.read(CHUNK_BYTES):
            if self._asked:
                self._asked = False
                await asyncio.sleep(self._latency_seconds)
            await _send(data, client, link)
        client.write_eof()


async def _send(data: bytes, sink: asyncio.StreamWriter, link: Link) -> None:
    await link.carry(len(data))
    sink.write(data)
    await sink.drain()


async def _relay(port: int, latency_seconds: float, bytes_per_second: float) -> None:
    there, back = Link(bytes_per_second), Link(bytes_per_second)

    async def serve(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection("127.0.0.1", port)
        connection = Connection(latency_seconds)
        with contextlib.closing(to_client), contextlib.closing(to_server):
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(connection.ask(client, to_server, there))
                    both.create_task(connection.answer(server, to_client, back))
            except* OSError:
                pass  # what broke on one side is closed on the other

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    port, latency_ms, *rate = sys.argv[1:]
    megabytes_per_second = float(rate[0]) if rate else MEGABYTES_PER_SECOND
    asyncio.run(_relay(int(port), float(latency_ms) / 1e3, megabytes_per_second * 1e6))


if __name__ == "__main__":
    main()
