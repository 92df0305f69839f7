"""A CUDA graph played by the CPU: what is captured is computed by replays only, at the addresses of the capture.

For `tests.cuda.simulated_device`, whose counts it does not know.
"""

import contextlib
import threading
from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

_thread = threading.local()
_of_backward = SimpleNamespace(recording=None)
"""Backward passes run in a thread of autograd's."""


class Recording:
    """The operations of a capture, with the tensors of the CPU that they read and wrote."""

    def __init__(self) -> None:
        self._operations: list[tuple[Callable[[], Any], list[Tensor]]] = []
        self._made: list[Tensor] = []

    def add(self, operation: Callable[[], Any], arguments: Any, result: Any) -> None:
        """`operation` reads `arguments` and has made `result`, which may share their memory."""
        self._operations.append((operation, _tensors(result)))
        read = {_address(tensor) for tensor in _tensors(arguments)}
        self._made.extend(tensor for tensor in _tensors(result) if _address(tensor) not in read)

    @contextlib.contextmanager
    def capturing(self) -> Generator[None]:
        """Capture this thread's operations. Afterwards their results hold no numbers: nothing has run yet."""
        _thread.recording = _of_backward.recording = self
        try:
            yield
        finally:
            _thread.recording = _of_backward.recording = None
            with _disable_current_modes():
                for tensor in self._made:
                    tensor.fill_(torch.nan if tensor.is_floating_point() else 1)

    def replay(self) -> None:
        """Run the operations on the same memory, in order."""
        with _disable_current_modes():
            for operation, results in self._operations:
                for old, new in zip(results, _tensors(operation()), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def recording() -> Recording | None:
    """The capture of this thread, or of the one that called `backward`, if there is one."""
    own = getattr(_thread, "recording", None)
    in_backward = torch._C._current_graph_task_id() != -1
    return _of_backward.recording if own is None and in_backward else own


def forbid_while_capturing(what: str) -> None:
    """RuntimeError as CUDA's, during a capture."""
    if recording() is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
