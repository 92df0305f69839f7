"""One question, is this a lack of memory?, for the many ways in which allocators and libraries say so."""

import re

import torch

_SIGNS = re.compile(
    r"can't allocate memory"  # the CPU's allocator
    r"|(?i:cuda)[^\n]*\bout of memory"  # torch, the driver, NCCL, Triton
    r"|CU(BLAS|DNN)_STATUS_\w*ALLOC\w*_FAILED"  # cuDNN 9 has a longer name for each place
)
"""The CPU's allocator and the libraries of CUDA raise a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device or the machine has no memory left for this piece of work."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _SIGNS.search(str(error)) is not None
