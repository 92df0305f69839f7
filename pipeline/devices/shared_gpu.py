"""A GPU that several processes share, and one that a process has lost."""

import torch

_HEADROOM = 0.1
"""Part of a share that is left for what torch does not allocate: CUDA's context and the libraries' own memory."""
_SIGNS = (
    "an illegal memory access was encountered",
    "an illegal instruction was encountered",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert triggered",
    "uncorrectable ECC error encountered",
    "hardware stack error",
    "the launch timed out and was terminated",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "GPU is lost",
    "unknown error",
)
"""In CUDA's words: what every later call of the process answers as well."""


def limit_memory(share: float) -> None:
    """Let torch allocate no more of the current GPU than this process's share, so that its neighbors have theirs.

    Otherwise their memory would decide how far a batch is halved, and so the bits of an image. No effect from 1 on.
    """
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share * (1 - _HEADROOM))


def is_context_lost(error: BaseException) -> bool:
    """Whether `error` left CUDA in a state from which this process cannot use the GPU any more."""
    text = str(error)
    return isinstance(error, RuntimeError) and "CUDA" in text and any(sign in text for sign in _SIGNS)
