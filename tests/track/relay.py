"""A TCP relay that can be cut off, frozen or made deaf."""

import socket
import threading
from contextlib import closing, suppress
from typing import Literal

Mode = Literal["open", "refuse", "freeze", "deaf"]


class Relay:
    """Forwards connections to a server, unless told otherwise.

    open: as if it were not there; refuse: every connection is reset; freeze: connections are taken and nothing is
    answered (a stopped process); deaf: requests reach the server, answers do not reach the client.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._live: set[socket.socket] = set()
        self.mode: Mode = "open"
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
                return
            server = socket.create_connection(self._target)
            self._live.add(server)
            back = threading.Thread(target=_copy, args=(server, client, mode == "deaf"), daemon=True)
            back.start()
            _copy(client, server, False)
            back.join(5)
            self._live.discard(server)
            server.close()
        self._live.discard(client)


def _copy(source: socket.socket, sink: socket.socket, swallow: bool) -> None:
    """Bytes from one to the other until the source ends; swallowed ones end both."""
    with suppress(OSError):
        while data := source.recv(65536):
            if swallow:
                break
            sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)
        source.shutdown(socket.SHUT_RDWR)
