"""What encodes images while others are sampled: a thread, or processes, which leave this one's interpreter alone."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Generator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Protocol

from ddpm_pipeline.generate.encoding import EncodedImages, SampledImages, encode


class Encoders(Protocol):
    """Encode images, and end with this process."""

    def submit(self, images: SampledImages) -> "Encoding":
        """Begin to encode images."""
        ...


class EncoderDied(Exception):  # noqa: N818 - the fact is the name
    """A process that encoded images ended before it was done. The images are lost, and have to be sampled again."""


class Encoding:
    """Images that are being encoded, in parts."""

    def __init__(self, parts: list[Future[EncodedImages]]) -> None:
        self._parts = parts

    def result(self) -> list[EncodedImages]:
        """Wait for the parts. EncoderDied if a process died; raises what encoding raised."""
        try:
            return [part.result() for part in self._parts]
        except BrokenProcessPool as error:
            raise EncoderDied(
                "a process that encodes images was killed, perhaps for lack of memory; new ones encode the next shard"
            ) from error


class EncoderThread:
    """Encodes in a thread: beside a network on the CPU, whose threads do not hold the interpreter."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def submit(self, images: SampledImages) -> Encoding:
        """Begin to encode images."""
        return Encoding([self._thread.submit(encode, images)])


class EncoderProcesses:
    """Encodes in processes, each a part of a batch. They start with the first batch; dead ones are replaced."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._starting = threading.Lock()
        self._pool = self._open()

    def submit(self, images: SampledImages) -> Encoding:
        """Begin to encode images."""
        parts = images.parts(self._number)
        with self._starting:
            try:
                return Encoding([self._pool.submit(encode, part) for part in parts])
            except BrokenProcessPool:  # since an earlier batch, whose `result` says so
                self._pool = self._open()
                return Encoding([self._pool.submit(encode, part) for part in parts])

    def _open(self) -> Executor:
        return ProcessPoolExecutor(self._number, _Context(), initializer=_end_with_parent)


class _Process(SpawnProcess):
    """A process that does not import its parent's main module: a Ray worker's would load Ray."""

    def start(self) -> None:
        with _nameless_main():
            super().start()


class _Context(SpawnContext):
    Process = _Process


@contextmanager
def _nameless_main() -> Generator[None]:
    """Hide from multiprocessing where this process's main module comes from."""
    names = vars(sys.modules["__main__"])
    hidden = {name: names[name] for name in ("__spec__", "__file__") if name in names}
    names.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        names.update(hidden)


def _end_with_parent() -> None:
    """End this process when its parent does, also when that is killed: multiprocessing would let it wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
