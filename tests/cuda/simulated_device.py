"""A CUDA device played by the CPU: tensors that say cuda:0, hold real numbers, and obey CUDA's rules of mixing devices.

It counts what a device would be asked for: kernels, copies in each direction, and waits of the host, each with the
line of the program that asked. It also plays that CUDA's group norm works on NCHW and its convolutions on NHWC, and
copies a tensor in the other layout; that attention and the gradient of SiLU have kernels of their own, and so have the
operators of `ddpm_pipeline.kernels`, whose references compute here; and that a copy is asynchronous only from or to
pinned memory. Everything happens at once, so a missing wait is not noticed. While a CUDA graph is captured, waits and
copies are errors; what was computed is spoilt afterwards, and only a replay computes it, at the addresses of the
capture.

Import it before torch.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

from tests.cuda.guard import load_guard

load_guard()

import sys  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._ops import OpOverload  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

import ddpm_pipeline  # noqa: E402
from ddpm_pipeline.kernels.tiling import Tiling  # noqa: E402
from tests.cuda.simulated_graph import Recording, forbid_while_capturing, recording  # noqa: E402

aten = torch.ops.aten
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
CUDA = torch.device("cuda", 0)
PACKAGE = f"{Path(ddpm_pipeline.__file__).parent}/"
OWN_FOLDER = str(Path(__file__).parent)

NO_KERNEL = {
    "alias",
    "detach",
    "empty.memory_format",
    "empty_like",
    "empty_strided",
    "is_same_size",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "record_stream",
    "sym_size",
    "_unsafe_view",
}
"""Operations that are no views and yet start nothing on a device."""
WAITS = {"nonzero", "masked_select", "_unique2", "unique_dim", "equal", "repeat_interleave"}
"""Operations whose result's size or value the host needs."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


def _never_called(*_: Any) -> None:
    """In place of a kernel of CUDA: operations on simulated tensors are handled before they get there."""
    raise AssertionError(_never_called.__doc__)


# Without a kernel for CUDA, torch would take this gradient apart before it reaches the simulated device.
_library = torch.library.Library("aten", "IMPL")
_library.impl("silu_backward", _never_called, "CUDA")


class Counts:
    """What a device was asked for since the last `reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin again at zero."""
        self.kernels: Counter[str] = Counter()
        """By operation. A layout copy that a kernel of CUDA needs is one called "layout copy"."""
        self.kernel_files: Counter[str] = Counter()
        """The same by the file that asked for them."""
        self.copies: Counter[str] = Counter()
        """Between host and device: H2D or D2H, sync or async."""
        self.waits: Counter[str] = Counter()
        """Of the host for the device, by what and where. A synchronous copy is one too."""
        self.background_waits: Counter[str] = Counter()
        """Waits of threads that the program started beside the one that launches kernels."""

        self.captured = 0
        """Kernels that were captured instead of launched."""

    launched = 0
    """Kernels in this process's life."""

    def kernel(self, name: str, number: int = 1) -> None:
        if recording() is not None:
            self.captured += number
            return
        self.launched += number
        self.kernels[name] += number
        self.kernel_files[_asked_at(lines=False)] += number

    def copy(self, direction: str, asynchronous: bool) -> None:
        forbid_while_capturing(f"{direction} copy")
        self.copies[f"{direction} {'async' if asynchronous else 'sync'}"] += 1
        if not asynchronous:
            self.wait(f"{direction} copy")

    def wait(self, what: str) -> None:
        forbid_while_capturing(what)
        waits = self.background_waits if threading.get_ident() in _background else self.waits
        waits[f"{what}: {_asked_at()}"] += 1


counts = Counts()
_background: set[int] = set()
_pinned: dict[int, torch.UntypedStorage] = {}
"""Storages that were asked to be pinned, by address; kept, so that no address is used again."""


def _asked_at(lines: bool = True) -> str:
    """The nearest lines (or the file) of the program above this one in the stack."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < 2:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            name = file.removeprefix(PACKAGE)
            if not lines:
                return name
            found.append(f"{name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found) or "backward pass"


class SimulatedTensor(Tensor):
    """A tensor of cuda:0 whose numbers are those of `inner`, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "SimulatedTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CUDA,
            requires_grad=False,
        )
        made.inner = inner
        return made

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"SimulatedTensor({self.inner!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """Sees also the operations without a tensor of the device: those that make one."""

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    if torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), COMPOSITE
    ):
        # In inference mode composite operations come here whole.
        with _Dispatch():
            return func._op_dk(COMPOSITE, *args, **kwargs)
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_device = any(isinstance(tensor, SimulatedTensor) for tensor in tensors)
    if not on_device and (device is None or device.type == "cpu"):
        return _on_host(func, args, kwargs)
    to_host = _count(func, args, kwargs, device, tensors)
    return _compute(func, args, kwargs, to_host)


def _on_host(func: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    pinned = kwargs.pop("pin_memory", False)
    result = func(*args, **kwargs)
    return _pin(result) if pinned else result


def _pin(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    _pinned[storage.data_ptr()] = storage
    return tensor


def _is_pinned(tensor: Tensor) -> bool:
    return not isinstance(tensor, SimulatedTensor) and tensor.untyped_storage().data_ptr() in _pinned


def _count(
    func: OpOverload, args: Any, kwargs: dict[str, Any], device: torch.device | None, tensors: list[Tensor]
) -> bool:
    """Count an operation that concerns the device; returns whether its result is on the host."""
    name = func._schema.name.removeprefix("aten::")
    if func is aten._to_copy.default:
        return _count_to(args[0], device, bool(kwargs.get("non_blocking", False)))
    if func is aten.copy_.default:
        non_blocking = bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        _count_copy(args[0], args[1], non_blocking)
        return not isinstance(args[0], SimulatedTensor)
    if name in INDEXING:
        _check_indexes(name, args)
    else:
        _check_devices(name, tensors)
    if (
        func is aten.clone.default
        and kwargs.get("memory_format", torch.preserve_format) != torch.preserve_format
    ):
        counts.kernel("layout copy")
    elif name == "_local_scalar_dense":
        counts.wait("number read")
    elif name in WAITS:
        counts.wait(name)
    elif name == "_scaled_dot_product_efficient_attention_backward":
        counts.kernel(name, 2)
    elif func.namespace == "ddpm":
        _count_own(name, args)
    elif not _is_view(func) and name not in NO_KERNEL and f"{name}.{func._overloadname}" not in NO_KERNEL:
        counts.kernel(name)
    return device is not None and device.type == "cpu" and not _is_view(func)


def _count_own(name: str, args: Any) -> None:
    """An operator of ddpm_pipeline.kernels: its launches, and the copies of maps that are not channels-last."""
    launches = 1
    if name == "ddpm::group_norm":
        launches = 1 + (Tiling.of(args[0], groups=args[3]).parts > 1)
    elif name == "ddpm::group_norm_backward":
        launches = 2 + (Tiling.of(args[1], groups=args[4].shape[1]).parts > 1)
    counts.kernel(name, launches)
    for map in args:
        if (
            isinstance(map, Tensor)
            and map.ndim == 4
            and not map.is_contiguous(memory_format=torch.channels_last)
        ):
            counts.kernel("layout copy")


def _count_to(source: Tensor, device: torch.device | None, non_blocking: bool) -> bool:
    from_device = isinstance(source, SimulatedTensor)
    to_device = from_device if device is None else device.type == "cuda"
    if from_device and to_device:
        counts.kernel("cast or copy")
    elif to_device:
        counts.copy("H2D", non_blocking and _is_pinned(source))
    else:
        counts.copy("D2H", non_blocking)  # torch allocates pinned memory for the result
    return not to_device


def _count_copy(target: Tensor, source: Tensor, non_blocking: bool) -> None:
    to_device, from_device = isinstance(target, SimulatedTensor), isinstance(source, SimulatedTensor)
    if to_device and from_device:
        counts.kernel("copy_")
    elif to_device:
        counts.copy("H2D", non_blocking and _is_pinned(source))
    else:
        counts.copy("D2H", non_blocking and _is_pinned(target))


def _check_indexes(name: str, args: Any) -> None:
    on_device = isinstance(args[0], SimulatedTensor)
    for index in args[1]:
        if index is None:
            continue
        if isinstance(index, SimulatedTensor) and not on_device:
            raise RuntimeError(
                f"{name}: indices should be either on cpu or on the device of the indexed tensor (cpu)"
            )
        if on_device and not isinstance(index, SimulatedTensor):
            counts.copy("H2D", asynchronous=False)
        if index.dtype in (torch.bool, torch.uint8):
            counts.wait("index by a mask")
    if name != "index" and isinstance(args[2], Tensor) and args[2].ndim:
        _check_devices(name, [args[0], args[2]])


def _check_devices(name: str, tensors: list[Tensor]) -> None:
    """On a device, tensors of the host may only be single numbers."""
    strangers = [t for t in tensors if not isinstance(t, SimulatedTensor) and t.ndim > 0]
    if strangers and len(strangers) < len(tensors):
        shapes = [tuple(t.shape) for t in strangers]
        raise RuntimeError(f"{name}: expected all tensors on one device, found cuda:0 and cpu, {shapes}")


def _is_view(func: OpOverload) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _compute(func: OpOverload, args: Any, kwargs: dict[str, Any], to_host: bool) -> Any:
    kwargs = dict(kwargs)
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    pinned = kwargs.pop("pin_memory", False)
    pinned = pinned or (func is aten._to_copy.default and kwargs.get("non_blocking"))
    wrappers: dict[int, SimulatedTensor] = {}

    def unwrapped(value: Any) -> Any:
        if isinstance(value, SimulatedTensor):
            wrappers[id(value.inner)] = value
            return value.inner
        return value

    inner_args, inner_kwargs = tree_map(unwrapped, args), tree_map(unwrapped, kwargs)
    in_layout = _in_layout_of_cuda(func, inner_args)
    if in_layout is not inner_args:
        counts.kernel("layout copy")

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in wrappers:
            return wrappers[id(value)]
        if to_host:
            return _pin(value) if pinned else value
        return SimulatedTensor(value)

    implementation = _IMPLEMENTATIONS.get(func, func)
    result = implementation(*in_layout, **inner_kwargs)
    graph = recording()
    if graph is not None:
        graph.add(
            lambda: implementation(*_in_layout_of_cuda(func, inner_args), **inner_kwargs),
            (inner_args, inner_kwargs),
            result,
        )
    return tree_map(wrapped, result)


def _in_layout_of_cuda(func: OpOverload, inner: Any) -> Any:
    """The arguments with the input copied to the layout that CUDA's kernel works on, where it is in another."""
    if func is aten.native_group_norm.default and not inner[0].is_contiguous():
        # at::native_group_norm takes a contiguous copy on all devices but the CPU
        return (inner[0].contiguous(), *inner[1:])
    is_convolution = func is aten.convolution.default and any(map(_only_channels_last, inner[:2]))
    if is_convolution and not inner[0].is_contiguous(memory_format=torch.channels_last):
        return (inner[0].contiguous(memory_format=torch.channels_last), *inner[1:])
    return inner


def _only_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, log_sum, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: None,
    out: Tensor,
    log_sum: Tensor,
    *_: Any,
    **__: Any,
) -> tuple[Tensor | None, ...]:
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, log_sum, 0.0, False)
    return *grads, None


_IMPLEMENTATIONS: dict[OpOverload, Callable[..., Any]] = {
    aten._scaled_dot_product_efficient_attention.default: _attention,
    aten._scaled_dot_product_efficient_attention_backward.default: _attention_backward,
}
"""What computes, on the CPU, the operations that only CUDA has."""

_attention_anywhere = F.scaled_dot_product_attention
_to_list, _pin_memory, _run_thread = Tensor.tolist, Tensor.pin_memory, threading.Thread.run


def _attention_as_on_cuda(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's choice on CUDA that takes every dtype, where a CPU build would take attention apart."""
    if not isinstance(q, SimulatedTensor):
        return _attention_anywhere(q, k, v)
    needs_grad = torch.is_grad_enabled() and q.requires_grad
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, needs_grad)[0]


def _to_list_after_waiting(tensor: Tensor) -> Any:
    if not isinstance(tensor, SimulatedTensor):
        return _to_list(tensor)
    counts.wait("tolist")
    return tensor.inner.tolist()


def _run_thread_on_device(thread: threading.Thread) -> None:
    _background.add(threading.get_ident())
    try:
        with _Dispatch():
            _run_thread(thread)
    finally:
        _background.discard(threading.get_ident())


class _Stream:
    """torch.cuda.Stream: work is done at once, in the order in which it is asked for."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = CUDA

    def wait_stream(self, stream: "_Stream") -> None: ...

    def wait_event(self, event: "_Event") -> None: ...

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        event = event or _Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        counts.wait("stream synchronize")


class _Event:
    """torch.cuda.Event. Waiting for it leaves the device busy if other kernels were launched after it."""

    def __init__(self, **_: Any) -> None:
        self._launched = -1

    def record(self, stream: _Stream | None = None) -> None:
        self._launched = counts.launched

    def wait(self, stream: _Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        if self._launched in (-1, counts.launched):
            counts.wait("event synchronize")


class _Graph(Recording):
    """torch.cuda.CUDAGraph: one launch of the host."""

    def replay(self) -> None:
        counts.kernel("graph")
        super().replay()


@contextlib.contextmanager
def _capture(graph: _Graph, stream: _Stream, capture_error_mode: str) -> Iterator[None]:
    """torch.cuda.graph, which first waits for the device."""
    counts.wait("device synchronize")
    with graph.capturing():
        yield


_CURRENT_STREAM = _Stream()
_PROPERTIES = SimpleNamespace(name="Simulated GPU", total_memory=16 << 30, major=9, minor=0)
_CUDA_INTERFACE: dict[str, Any] = {
    "CUDAGraph": _Graph,
    "Event": _Event,
    "Stream": _Stream,
    "_lazy_init": lambda: None,
    "device": lambda device: contextlib.nullcontext(),
    "current_stream": lambda device=None: _CURRENT_STREAM,
    "device_count": lambda: 1,
    "empty_cache": lambda: None,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: _PROPERTIES.name,
    "get_device_properties": lambda device=None: _PROPERTIES,
    "graph": _capture,
    "is_available": lambda: True,
    "is_bf16_supported": lambda including_emulation=True: True,
    "max_memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "stream": lambda stream: contextlib.nullcontext(),
    "synchronize": lambda device=None: counts.wait("device synchronize"),
}


@contextlib.contextmanager
def simulated_device() -> Iterator[Counts]:
    """While it is open, this process has one CUDA device, and `counts` says what it was asked for."""
    # A module moved to the device gets other parameters: those it has cannot change their type in place.
    torch.__future__.set_swap_module_params_on_conversion(True)
    with (
        mock.patch.multiple(torch.cuda, **_CUDA_INTERFACE),
        mock.patch.multiple(
            Tensor,
            tolist=_to_list_after_waiting,
            record_stream=lambda tensor, stream: None,
            pin_memory=lambda tensor, device=None: _pin(tensor.clone()),
            is_pinned=lambda tensor, device=None: _is_pinned(tensor),
        ),
        mock.patch.object(threading.Thread, "run", _run_thread_on_device),
        mock.patch.object(F, "scaled_dot_product_attention", _attention_as_on_cuda),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False),
        _Dispatch(),
    ):
        yield counts
