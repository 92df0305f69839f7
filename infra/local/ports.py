"""Free TCP ports, away from those that outgoing connections and Ray's own defaults take."""

import random
import socket
import time
from collections.abc import Collection

_RANGE = range(20_000, 32_000)


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` on every interface now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))  # never listens: nothing is exposed
        except OSError:
            return False
    return True


def wait_until_free(numbers: Collection[int], seconds: float) -> None:
    """Return once all these ports are free, at the latest after so many seconds."""
    deadline = time.monotonic() + seconds
    while not all(map(is_free, numbers)) and time.monotonic() < deadline:
        time.sleep(0.05)


def choose(names: Collection[str], taken: Collection[int] = ()) -> dict[str, int]:
    """A free port for each name, none of them in `taken`."""
    source = random.SystemRandom()
    chosen: dict[str, int] = {}
    while len(chosen) < len(names):
        port = source.choice(_RANGE)
        if port not in taken and port not in chosen.values() and is_free(port):
            chosen[list(names)[len(chosen)]] = port
    return chosen
