"""Work of a GPU as one CUDA graph: the host launches it at once instead of each of its kernels."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CapturedWork(Generic[T]):
    """A graph and the tensors that it writes. They stay where they are: its kernels know their addresses."""

    graph: torch.cuda.CUDAGraph
    result: T

    def replay(self) -> T:
        """Launch the work on the current stream; the next replay writes over the result."""
        self.graph.replay()
        return self.result


def capture(work: Callable[[], T], device: torch.device, otherwise: str) -> CapturedWork[T] | None:
    """The graph of `work`, which is not computed yet; None, after a warning, where it cannot be captured.

    work: has run before in this thread, so that Triton's kernels are compiled, and handles of cuBLAS and cuDNN made. It
    waits for nothing, copies nothing from the host, and reads nothing from it that changes. otherwise: begins the
    warning. A lack of memory is a failure like others: there may be enough without a graph.
    """
    try:
        return _capture(work, device)
    except RuntimeError as error:
        # An error within the capture is followed by one of its end, which does not say why.
        first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
        reason = f"{type(first).__name__}: {' '.join(str(first).split())[:300]}"
    log.warning("%s: %s", otherwise, reason)
    torch.cuda.empty_cache()  # outside the handler: the exception's traceback held the memory
    return None


def _capture(work: Callable[[], T], device: torch.device) -> CapturedWork[T]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    # torch.cuda.graph leaves its stream the current one if the capture fails; the outer block does not. Other threads
    # may use CUDA meanwhile.
    with (
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        result = work()
    return CapturedWork(graph, result)
