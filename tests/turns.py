"""Jobs whose requests come in an order that a seed draws, and who may die at any of them."""

import random
import threading


class Died(Exception):  # noqa: N818 - it is no error here
    """A job was killed."""


class Turns:
    """Lets one of several threads take a step at a time, in an order drawn by a seed."""

    def __init__(self, seed: int, names: range) -> None:
        self._chance = random.Random(seed)
        self._living = set(names)
        self._changed = threading.Condition()
        self._turn = self._chance.choice(sorted(self._living))

    def wait(self, name: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._turn == name, 30)

    def next(self, ended: int | None = None) -> None:
        with self._changed:
            self._living.discard(-1 if ended is None else ended)
            if self._living:
                self._turn = self._chance.choice(sorted(self._living))
            self._changed.notify_all()
