"""Starting Triton's kernels from torch."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def launch(
    kernel: Any,
    programs: int,
    out: Tensor,
    *arguments: Tensor | int | float,
    fuse: bool,
    **constants: int | str,
) -> None:
    """Start `programs` programs of `kernel` on the current stream of `out`'s device.

    fuse: let the compiler make one operation of a product and a sum, which rounds once instead of twice.
    """
    if programs == 0:
        return
    # Triton starts kernels on the current device, wherever the tensors are.
    elsewhere = out.is_cuda and out.device.index != torch.cuda.current_device()
    with torch.cuda.device(out.device) if elsewhere else nullcontext():
        kernel[(programs,)](out, *arguments, **constants, enable_fp_fusion=fuse)


def signed(word: int) -> int:
    """The int32 with the same bits as the low 32 of `word`: a kernel's argument of one type, whatever its value."""
    return ((word + 2**31) & 0xFFFFFFFF) - 2**31
