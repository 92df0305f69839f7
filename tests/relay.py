"""A TCP relay in front of a server, which can be cut off, frozen, made deaf, slow, busy or a liar."""

import random
import re
import socket
import threading
import time
from contextlib import closing, suppress
from typing import Literal

Mode = Literal["open", "refuse", "freeze", "deaf", "delay", "slow", "cut", "busy", "corrupt"]

DELAY_SECONDS = 0.2
BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
_REQUEST = re.compile(rb"(?:GET|POST|PUT|PATCH|DELETE) \S+")
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


class Relay:
    """Forwards connections to a server, unless told otherwise.

    open: as if it were not there; refuse: every connection is reset; freeze: connections are taken and nothing is
    answered (a stopped process); deaf: requests reach the server, answers do not reach the client; delay: every
    piece of an answer comes late; slow: no answer comes sooner than `slow_seconds` after its request; cut: answers
    end after some random bytes; busy: every request is answered 503 SlowDown; corrupt: one byte of some answers is
    another.
    """

    def __init__(self, host: str, port: int, seed: int = 0) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._live: set[socket.socket] = set()
        self._chance = random.Random(seed)
        self.mode: Mode = "open"
        self.slow_seconds = 1.0
        self.requests: list[str] = []
        """The first line of every HTTP request in mode slow."""
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def switch(self, mode: Mode) -> None:
        """Change the mode; connections from before are cut."""
        self.mode = mode
        for connection in list(self._live):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.switch("refuse")
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.mode == "refuse":
                client.close()
                continue
            self._live.add(client)
            threading.Thread(target=self._serve, args=(client, self.mode), daemon=True).start()

    def _serve(self, client: socket.socket, mode: Mode) -> None:
        with closing(client), suppress(OSError):
            if mode == "freeze":
                while client.recv(65536):
                    pass
            elif mode == "busy":
                client.recv(65536)
                client.sendall(BUSY % len(SLOW_DOWN) + SLOW_DOWN)
            else:
                self._forward(client, mode)
        self._live.discard(client)

    def _forward(self, client: socket.socket, mode: Mode) -> None:
        server = socket.create_connection(self._target)
        self._live.add(server)
        asked = [0.0]
        back = threading.Thread(target=self._answer, args=(server, client, mode, asked), daemon=True)
        back.start()
        with suppress(OSError):
            while data := client.recv(65536):
                asked[0] = time.monotonic()
                if mode == "slow" and (line := _REQUEST.match(data)):
                    self.requests.append(line[0].decode())
                server.sendall(data)
        _end(server, client)
        back.join(5)
        self._live.discard(server)
        server.close()

    def _answer(self, server: socket.socket, client: socket.socket, mode: Mode, asked: list[float]) -> None:
        """`asked`: when the client last sent something."""
        left = self._chance.randint(1, 20_000) if mode == "cut" else None
        with suppress(OSError):
            while data := server.recv(65536):
                if mode == "deaf":
                    break
                if mode == "delay":
                    time.sleep(DELAY_SECONDS)
                if mode == "slow":
                    time.sleep(max(0.0, asked[0] + self.slow_seconds - time.monotonic()))
                if mode == "corrupt" and self._chance.random() < 0.3:
                    data = self._lie(data)
                client.sendall(data if left is None else data[:left])
                if left is not None:
                    left -= len(data)
                    if left <= 0:
                        break
        _end(server, client)

    def _lie(self, data: bytes) -> bytes:
        place = self._chance.randrange(len(data))
        return data[:place] + bytes([data[place] ^ (1 << self._chance.randrange(8))]) + data[place + 1 :]


def _end(*sockets: socket.socket) -> None:
    for one in sockets:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
