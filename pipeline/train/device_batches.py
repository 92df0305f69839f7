"""Batches on the training's device, copied there while the step before runs."""

import queue
import threading
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm_pipeline.data.reading.loader import Batch

DEPTH = 2
"""Batches on the device ahead of use. The loader's own are in the host's memory."""
JOIN_SECONDS = 10.0
"""A thread that waits for a store that is away ends with the process."""


def device_batches(batches: Iterable[Batch], device: torch.device) -> Generator[Batch]:
    """The batches with their tensors on `device`. Raises what iterating raises.

    For a GPU a thread iterates and copies, from pinned memory and on a stream of its own, so that neither the host nor
    the device waits for a copy. Close the iterator to end the thread. On the CPU these are the batches as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    copier = _Copier(batches, device)
    try:
        while (batch := copier.take()) is not None:
            yield batch
    finally:
        copier.close()


@dataclass(frozen=True)
class _Copied:
    batch: Batch
    ready: torch.cuda.Event
    """The copies are done."""


class _Copier:
    """The thread, and the queue between it and the training."""

    def __init__(self, batches: Iterable[Batch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._queue: queue.Queue[_Copied | Exception | None] = queue.Queue(DEPTH)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="copy-to-device", daemon=True)
        self._thread.start()

    def take(self) -> Batch | None:
        """The next batch, which the current stream waits for; None after the last."""
        began = time.perf_counter()
        found = self._queue.get()
        if found is None:
            return None
        if isinstance(found, Exception):
            raise found
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(found.ready)
        for tensor in found.batch.tensors().values():
            tensor.record_stream(stream)  # its memory belongs to the copying stream
        return replace(found.batch, wait_seconds=time.perf_counter() - began)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        try:
            with torch.cuda.device(self._device):  # a thread begins with the first device
                stream = torch.cuda.Stream(self._device)
                for batch in self._batches:
                    if not self._put(_copied(batch, self._device, stream)):
                        return
            self._put(None)
        except Exception as error:  # noqa: BLE001  (raised in the training's thread)
            self._put(error)

    def _put(self, item: _Copied | Exception | None) -> bool:
        """Wait for room; False once nobody takes any more."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


def _copied(batch: Batch, device: torch.device, stream: torch.cuda.Stream) -> _Copied:
    def moved(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)

    with torch.cuda.stream(stream):
        there = batch.map(moved)
        ready = torch.cuda.Event()
        ready.record(stream)
    return _Copied(there, ready)
