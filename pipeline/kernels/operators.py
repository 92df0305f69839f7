"""Operators of torch with two implementations: a kernel for GPUs, and a reference in torch for every other device.

As operators of torch they are opaque to `torch.compile`: a compiled network calls them as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_pipeline.devices.triton_version import triton_version

NAMESPACE = "ddpm"
# Kept for the life of the process: torch forgets operators with the library that defines them.
_library = torch.library.Library(NAMESPACE, "DEF")

Implementation = Callable[..., Any]


def define_operator(
    schema: str, *, reference: Implementation, launch: Implementation, shapes: Implementation
) -> Callable[..., Any]:
    """A new operator `ddpm::NAME`.

    schema: as torch writes them, `name(Tensor x, int n) -> Tensor`. reference: its meaning, in torch, without
    gradients. launch: the same by Triton, called for CUDA tensors where Triton runs. shapes: empty tensors like the
    results, for tracing. Gradients are the callers' part, by `torch.autograd.Function`: its overhead is half that of
    `torch.library.register_autograd`.
    """
    name = schema.partition("(")[0]

    def on_cuda(*arguments: Any) -> Any:
        return (launch if triton_version() is not None else reference)(*arguments)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _library.impl(name, reference, "CPU")
    _library.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def on_gpu(tensor: Tensor) -> bool:
    """Whether operators compute on `tensor` by kernels."""
    return tensor.device.type == "cuda"
