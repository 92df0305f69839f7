"""What the loader benchmark compares, and the slow network in front of its store. No time is asserted."""

import asyncio
import socket
import threading
from contextlib import closing
from typing import cast

import pytest

from benchmarks import slow_network
from benchmarks.loader import LATENCIES_MS, PEERS, Place, line_up, ratios

REMOTE = [Place("_s3", "s3://b/p"), *(Place(f"_s3_{ms}ms", "s3://b/p", "http://x") for ms in LATENCIES_MS)]


def names(with_peers: bool) -> list[str]:
    return [f"{name}{place.suffix}.{case}" for case, name, place in line_up(with_peers, REMOTE)]


@pytest.mark.parametrize("with_peers", [True, False])
def test_every_contender_meets_ours_in_the_same_place(with_peers: bool) -> None:
    every = names(with_peers)
    assert len(set(every)) == len(every)
    rates = {name: {"cpu": 2.0 if name.startswith("ours") else 1.0, "wall": 3.0} for name in every}
    found = ratios([rates, rates])
    peers = {"bare", "webdataset", *(PEERS if with_peers else ())}
    for case in ("pillow", "own", "jpeg", "jpeg_own"):
        assert {f"ours_over_{peer}_{case}_cpu" for peer in peers} <= set(found)
    assert {
        "ours_s3_20ms_own_over_webdataset_s3_20ms_pillow_wall",
        "ours_own_over_webdataset_pillow_cpu",
        "ours_s3_jpeg_own_over_webdataset_s3_jpeg_cpu",
    } <= set(found)
    assert {ratio.median for name, ratio in found.items() if name.endswith("_cpu")} == {2.0}
    assert {ratio.median for name, ratio in found.items() if name.endswith("_wall")} == {1.0}


def test_peers_are_left_out_where_they_are_not_installed() -> None:
    assert not [name for name in names(with_peers=False) if name.startswith(PEERS)]


class Writer:
    """As much of a stream as a connection writes to."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data

    async def drain(self) -> None:
        """There is always room."""

    def write_eof(self) -> None:
        self.data += b"."


def read_from(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


def test_an_answer_waits_for_the_latency_once_and_for_each_byte_on_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(round(seconds, 2))

    async def exchange() -> bytes:
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 0.0)
        monkeypatch.setattr(slow_network.asyncio, "sleep", sleep)
        connection, back, sink = slow_network.Connection(7.0), slow_network.Link(10.0), Writer()
        client = cast(asyncio.StreamWriter, sink)
        await connection.ask(read_from(b"question"), client, slow_network.Link(10.0))
        await connection.answer(read_from(b"answer"), client, back)
        await connection.answer(read_from(b"more"), client, back)
        return sink.data

    assert asyncio.run(exchange()) == b"question.answer.more."
    assert slept == [0.8, 7.0, 0.6, 1.0]


def test_a_slow_network_changes_no_byte() -> None:
    sent, answer = bytes(range(256)) * 1000, b"%d bytes" * 10_000
    got: list[bytes] = []

    def serve() -> None:
        with closing(listener.accept()[0]) as connection:
            got.append(b"".join(iter(lambda: connection.recv(1 << 16), b"")))
            connection.sendall(answer)

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        server = threading.Thread(target=serve)
        server.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with slow_network.slow_network(address, latency_ms=1) as slow:
            port = int(slow.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)
                assert b"".join(iter(lambda: client.recv(1 << 16), b"")) == answer
        server.join(30)
    assert got == [sent]
