"""Half precision on a CPU that has no instructions for it: it works, many times slower than float32."""

import logging
import time

import torch

NATIVE = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}
"""Instructions of x86 that multiply in each precision; one of them is enough."""
log = logging.getLogger(__name__)


def warn_if_emulated(dtype: torch.dtype, device: torch.device) -> None:
    """Log how much slower `dtype` is than float32 where `device` is a CPU that emulates it. Takes some hundredths of a
    second there, and no time elsewhere.
    """
    if device.type == "cpu" and is_emulated(dtype):
        name = str(dtype).removeprefix("torch.")
        log.warning(
            "this CPU emulates %s: a convolution takes %.0f times as long as in float32; use float32 here",
            name,
            _convolution_seconds(dtype) / _convolution_seconds(torch.float32),
        )


def is_emulated(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU lacks instructions for `dtype`. Known of x86; others are taken to have them."""
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("architecture") != "x86_64" or dtype not in NATIVE:
        return False
    return not any(capabilities.get(name) for name in NATIVE[dtype])


def _convolution_seconds(dtype: torch.dtype) -> float:
    """Shortest of three runs of a small convolution, after one that is not timed."""
    convolution = torch.nn.Conv2d(32, 32, 3, padding=1, dtype=dtype)
    x = torch.ones(2, 32, 8, 8, dtype=dtype)
    seconds = list[float]()
    with torch.inference_mode():
        for _ in range(4):
            began = time.perf_counter()
            convolution(x)
            seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
