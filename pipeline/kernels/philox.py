# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportGeneralTypeIssues=false
# Triton compiles the functions marked `triton.jit` from their source and gives their parameters types of its own.
"""Triton kernels of named random numbers: bit for bit those of `ddpm_pipeline.diffusion.noise`, which defines them.

Compiled without fused multiply-add, which rounds once where the definition rounds twice.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_pipeline.kernels.launching import launch, signed

BLOCK = 256

# Series of -2 ln m in s = (m-1)/(m+1), of sine and of cosine, as in ddpm_pipeline.diffusion.noise.
_LOG: tl.constexpr = tl.constexpr(tuple(4.0 / (2 * k + 1) for k in range(8)))
_SINE: tl.constexpr = tl.constexpr(tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(7)))
_COSINE: tl.constexpr = tl.constexpr(tuple((-1.0) ** k / math.factorial(2 * k) for k in range(8)))
_TWO_LOG_2: tl.constexpr = tl.constexpr(-2 * math.log(2))
_ANGLE_UNIT: tl.constexpr = tl.constexpr(math.pi * 2.0**-31)
_ROOT_HALF_BITS: tl.constexpr = tl.constexpr(0x3FE6A09E667F3BCD)


@triton.jit
def _philox(index, block, step, key0, key1):
    zero = tl.zeros_like(block)
    low = zero + index.to(tl.uint32)
    high = zero + (index >> 32).to(tl.uint32)
    return tl.philox_impl(
        block,
        zero + step,
        low,
        high,
        zero + key0.to(tl.uint32, bitcast=True),
        zero + key1.to(tl.uint32, bitcast=True),
    )


@triton.jit
def _step(step, device_step, STEP_IN_MEMORY: tl.constexpr):
    if STEP_IN_MEMORY:
        return tl.load(device_step).to(tl.uint32)
    return step.to(tl.uint32, bitcast=True)


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    value = x * COEFFICIENTS[DEGREE]
    for k in tl.static_range(DEGREE - 1):
        value = (value + COEFFICIENTS[DEGREE - 1 - k]) * x
    return value + COEFFICIENTS[0]


@triton.jit
def _box_muller(radius_word, angle_word):
    u = (radius_word.to(tl.float64) + 0.5) * 2.0**-32
    bits = u.to(tl.int64, bitcast=True)
    exponent = (bits - _ROOT_HALF_BITS) >> 52
    m = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    series = _polynomial(s * s, _LOG, 7) * s
    radius = tl.sqrt(exponent.to(tl.float64) * _TWO_LOG_2 - series)
    quarter = ((angle_word & 0x3FFFFFFF).to(tl.float64) + (0.5 - 2.0**29)) * _ANGLE_UNIT
    square = quarter * quarter
    sine = _polynomial(square, _SINE, 6) * quarter
    cosine = _polynomial(square, _COSINE, 7)
    radius = tl.where((angle_word >> 31) != 0, -radius, radius)
    mirrored = (angle_word & 0x40000000) != 0
    return (
        (tl.where(mirrored, sine, cosine) * radius).to(tl.float32),
        (tl.where(mirrored, cosine, sine) * radius).to(tl.float32),
    )


@triton.jit(do_not_specialize=["key0", "key1", "step"])
def normal_kernel(
    out, index, device_step, key0, key1, step, count, tiles, STEP_IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr
):
    """A row of `count` normals for each index; a program computes the 4*BLOCK values of BLOCK counter blocks."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    block = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.uint32)
    step = _step(step, device_step, STEP_IN_MEMORY)
    w0, w1, w2, w3 = _philox(tl.load(index + row), block, step, key0, key1)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    values = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    place = tile.to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out + row * count + place, values, mask=place < count)


@triton.jit(do_not_specialize=["key0", "key1", "step", "high"])
def one_block_kernel(
    out,
    index,
    device_step,
    key0,
    key1,
    step,
    high,
    count,
    KIND: tl.constexpr,
    STEP_IN_MEMORY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the first counter block of each index: its four words, an integer below `high`, or a uniform."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < count
    zero = tl.zeros([BLOCK], tl.uint32)
    step = _step(step, device_step, STEP_IN_MEMORY)
    w0, w1, w2, w3 = _philox(tl.load(index + row, mask=mask, other=0), zero, step, key0, key1)
    if KIND == "words":
        at = out + row.to(tl.int64) * 4
        tl.store(at, w0.to(tl.int64), mask=mask)
        tl.store(at + 1, w1.to(tl.int64), mask=mask)
        tl.store(at + 2, w2.to(tl.int64), mask=mask)
        tl.store(at + 3, w3.to(tl.int64), mask=mask)
    elif KIND == "integer":
        bound = high.to(tl.uint32, bitcast=True).to(tl.uint64)
        top = (w0.to(tl.uint64) * bound + ((w1.to(tl.uint64) * bound) >> 32)) >> 32
        tl.store(out + row, top.to(tl.int64), mask=mask)
    else:
        tl.store(out + row, (w0 >> 8).to(tl.float32) * 2.0**-24, mask=mask)


def launch_normal(
    index: Tensor, device_step: Tensor | None, key0: int, key1: int, step: int, count: int
) -> Tensor:
    """Normals float32 (B, count), as `ddpm_pipeline.diffusion.noise` defines them."""
    index = index.contiguous()
    out = index.new_empty((len(index), count), dtype=torch.float32)
    tiles = -(-count // (4 * BLOCK))
    launch(
        normal_kernel,
        len(index) * tiles,
        out,
        index,
        *_names(index, device_step, key0, key1, step),
        count,
        tiles,
        STEP_IN_MEMORY=device_step is not None,
        BLOCK=BLOCK,
        fuse=False,
    )
    return out


def launch_one_block(
    index: Tensor, device_step: Tensor | None, key0: int, key1: int, step: int, high: int, kind: str
) -> Tensor:
    """By kind: `words` int64 (B, 4), `integer` int64 (B,) below high, `uniform` float32 (B,)."""
    index = index.contiguous()
    shape = (len(index), 4) if kind == "words" else (len(index),)
    out = index.new_empty(shape, dtype=torch.float32 if kind == "uniform" else torch.int64)
    launch(
        one_block_kernel,
        -(-len(index) // BLOCK),
        out,
        index,
        *_names(index, device_step, key0, key1, step),
        signed(high),
        len(index),
        KIND=kind,
        STEP_IN_MEMORY=device_step is not None,
        BLOCK=BLOCK,
        fuse=False,
    )
    return out


def _names(
    index: Tensor, device_step: Tensor | None, key0: int, key1: int, step: int
) -> tuple[Tensor, int, int, int]:
    """Arguments `device_step` to `step` of both kernels; a pointer stands for the step that is not in memory."""
    return index if device_step is None else device_step, signed(key0), signed(key1), signed(step)
