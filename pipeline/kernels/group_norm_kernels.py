# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportGeneralTypeIssues=false
# Triton compiles the functions marked `triton.jit` from their source and gives their parameters types of its own.
"""Triton kernels of group normalization, with or without SiLU after it, for channels-last feature maps.

cuDNN's convolutions want that layout; torch's own group norm copies it to the other one and back. Sums have a fixed
order: they depend on the shape of one sample, neither on the batch nor on timing.

A map (B, C, H, W) is stored as (B, H*W, C). A program reads some rows of it, `ROWS` at a time, and whole groups: tiles
of (ROWS, GROUPS, WIDTH), the last two padded to powers of two. A map of more rows than one program reads takes two
kernels each way: the first writes sums of each part of the rows, the second adds them up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_pipeline.kernels.launching import launch
from ddpm_pipeline.kernels.tiling import Tiling


@triton.jit
def _program(groups, parts, GROUPS: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr):
    """Sample, part of the rows, and the channels (1, GROUPS, PLACES) of this program with the mask of those there
    are."""
    blocks = tl.cdiv(groups, GROUPS)
    block = tl.program_id(0) % blocks
    part = (tl.program_id(0) // blocks) % parts
    sample = (tl.program_id(0) // blocks // parts).to(tl.int64)
    group = block * GROUPS + tl.arange(0, GROUPS)
    place = tl.arange(0, PLACES)
    channel = (group[:, None] * WIDTH + place[None, :])[None]
    there = ((group < groups)[:, None] & (place < WIDTH)[None, :])[None]
    return sample, part, group, channel, there


@triton.jit
def _rows(start, end, channels, channel, there, ROWS: tl.constexpr):
    """Offsets in a sample of the tile that begins at row `start`, and its mask."""
    row = (start + tl.arange(0, ROWS))[:, None, None]
    return row * channels + channel, (row < end) & there


@triton.jit
def _moments(
    x, first, end, channels, channel, there, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Mean and sum of squared differences from it (GROUPS,) over rows first..end-1 (Chan et al. 1979)."""
    mean = tl.zeros([GROUPS], tl.float32)
    squares = tl.zeros([GROUPS], tl.float32)
    for start in range(first, end, ROWS):
        at, mask = _rows(start, end, channels, channel, there, ROWS)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        before = ((start - first) * WIDTH).to(tl.float32)
        here = (tl.minimum(ROWS, end - start) * WIDTH).to(tl.float32)
        tile_mean = tl.sum(tl.sum(value, axis=2), axis=0) / here
        apart = tl.where(mask, value - tile_mean[None, :, None], 0.0)
        delta = tile_mean - mean
        mean += delta * (here / (before + here))
        squares += tl.sum(tl.sum(apart * apart, axis=2), axis=0) + delta * delta * (
            before * here / (before + here)
        )
    return mean, squares


@triton.jit(do_not_specialize=["rows", "groups", "part_rows", "parts"])
def part_moments_kernel(
    moments, x, rows, channels, groups, part_rows, parts,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """moments (B, parts, groups, 2): mean and sum of squared differences of each part of the rows."""
    sample, part, group, channel, there = _program(groups, parts, GROUPS, WIDTH, PLACES)
    first = part * part_rows
    end = tl.minimum(rows, first + part_rows)
    x += sample * rows * channels
    mean, squares = _moments(x, first, end, channels, channel, there, GROUPS, WIDTH, ROWS)
    at = moments + ((sample * parts + part) * groups + group) * 2
    tl.store(at, mean, mask=group < groups)
    tl.store(at + 1, squares, mask=group < groups)


@triton.jit(do_not_specialize=["rows", "groups", "part_rows", "parts"])
def normalize_kernel(
    out, statistics, moments, x, weight, bias, rows, channels, groups, part_rows, parts, eps,
    SILU: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out like x; statistics (B, groups, 2): mean and 1/standard deviation. WHOLE: one part, its moments found here."""
    sample, part, group, channel, there = _program(groups, parts, GROUPS, WIDTH, PLACES)
    first = part * part_rows
    end = tl.minimum(rows, first + part_rows)
    x += sample * rows * channels
    out += sample * rows * channels
    if WHOLE:
        mean, squares = _moments(x, first, end, channels, channel, there, GROUPS, WIDTH, ROWS)
    else:
        each = tl.arange(0, PARTS)[:, None]
        real = (each < parts) & (group < groups)[None, :]
        stored = moments + ((sample * parts + each) * groups + group[None, :]) * 2
        means = tl.load(stored, mask=real, other=0.0)
        count = (tl.maximum(tl.minimum(part_rows, rows - each * part_rows), 0) * WIDTH).to(tl.float32)
        mean = tl.sum(means * count, axis=0) / (rows * WIDTH).to(tl.float32)
        apart = means - mean[None, :]
        inside = tl.load(stored + 1, mask=real, other=0.0)
        squares = tl.sum(tl.where(real, inside + apart * apart * count, 0.0), axis=0)
    scale = 1.0 / tl.sqrt_rn(squares / (rows * WIDTH).to(tl.float32) + eps)
    if part == 0:
        kept = statistics + (sample * groups + group) * 2
        tl.store(kept, mean, mask=group < groups)
        tl.store(kept + 1, scale, mask=group < groups)
    gain = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    for start in range(first, end, ROWS):
        at, mask = _rows(start, end, channels, channel, there, ROWS)
        value = tl.load(x + at, mask=mask, other=0.0)
        z = (value.to(tl.float32) - mean[None, :, None]) * scale[None, :, None] * gain + shift
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(out + at, z.to(value.dtype), mask=mask)


@triton.jit
def _gradient_at(grad, x, at, mask, mean, scale, gain, shift, SILU: tl.constexpr):
    """The normalized values of a tile, and the loss's gradient by what comes before SiLU."""
    normal = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean) * scale
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        z = normal * gain + shift
        s = tl.sigmoid(z)
        g = g * (s * (1.0 + z * (1.0 - s)))
    return normal, g


@triton.jit
def _gradient_sums(
    grad, x, first, end, channels, channel, there, mean, scale, gain, shift,
    SILU: tl.constexpr, GROUPS: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums over rows first..end-1 of the gradient (1, GROUPS, PLACES), and of it times the normalized values."""
    of_gradient = tl.zeros([1, GROUPS, PLACES], tl.float32)
    of_product = tl.zeros([1, GROUPS, PLACES], tl.float32)
    for start in range(first, end, ROWS):
        at, mask = _rows(start, end, channels, channel, there, ROWS)
        normal, g = _gradient_at(grad, x, at, mask, mean, scale, gain, shift, SILU)
        of_gradient += tl.sum(g, axis=0)[None]
        of_product += tl.sum(g * normal, axis=0)[None]
    return of_gradient, of_product


@triton.jit
def _group_parameters(statistics, weight, bias, sample, groups, group, channel, there):
    at = statistics + ((sample * groups + group) * 2)[None, :, None]
    mean = tl.load(at, mask=(group < groups)[None, :, None], other=0.0)
    scale = tl.load(at + 1, mask=(group < groups)[None, :, None], other=0.0)
    gain = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    return mean, scale, gain, shift


@triton.jit(do_not_specialize=["rows", "groups", "part_rows", "parts"])
def part_gradients_kernel(
    sums, grad, x, weight, bias, statistics, rows, channels, groups, part_rows, parts,
    SILU: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """sums (2, B, parts, C): gradients of weight and bias, of each part of the rows of each sample."""
    sample, part, group, channel, there = _program(groups, parts, GROUPS, WIDTH, PLACES)
    first = part * part_rows
    end = tl.minimum(rows, first + part_rows)
    x += sample * rows * channels
    grad += sample * rows * channels
    mean, scale, gain, shift = _group_parameters(
        statistics, weight, bias, sample, groups, group, channel, there
    )
    of_gradient, of_product = _gradient_sums(
        grad, x, first, end, channels, channel, there, mean, scale, gain, shift, SILU, GROUPS, PLACES, ROWS
    )
    batch = (tl.num_programs(0) // parts // tl.cdiv(groups, GROUPS)).to(tl.int64)
    at = sums + (sample * parts + part) * channels + channel
    tl.store(at, of_product, mask=there)
    tl.store(at + batch * parts * channels, of_gradient, mask=there)


@triton.jit(do_not_specialize=["rows", "groups", "part_rows", "parts"])
def gradient_kernel(
    out, sums, grad, x, weight, bias, statistics, rows, channels, groups, part_rows, parts,
    SILU: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out: the gradient by x. WHOLE: one part, whose sums (2, B, 1, C) are found here and stored."""
    sample, part, group, channel, there = _program(groups, parts, GROUPS, WIDTH, PLACES)
    first = part * part_rows
    end = tl.minimum(rows, first + part_rows)
    x += sample * rows * channels
    grad += sample * rows * channels
    out += sample * rows * channels
    mean, scale, gain, shift = _group_parameters(
        statistics, weight, bias, sample, groups, group, channel, there
    )
    batch = (tl.num_programs(0) // parts // tl.cdiv(groups, GROUPS)).to(tl.int64)
    if WHOLE:
        of_gradient, of_product = _gradient_sums(
            grad,
            x,
            first,
            end,
            channels,
            channel,
            there,
            mean,
            scale,
            gain,
            shift,
            SILU,
            GROUPS,
            PLACES,
            ROWS,
        )
        kept = sums + sample * channels + channel
        tl.store(kept, of_product, mask=there)
        tl.store(kept + batch * channels, of_gradient, mask=there)
    else:
        each = tl.arange(0, PARTS)[:, None, None]
        stored = sums + (sample * parts + each) * channels + channel
        real = (each < parts) & there
        of_product = tl.sum(tl.load(stored, mask=real, other=0.0), axis=0)[None]
        of_gradient = tl.sum(tl.load(stored + batch * parts * channels, mask=real, other=0.0), axis=0)[None]
    count = (rows * WIDTH).to(tl.float32)
    level = (tl.sum(of_gradient * gain, axis=2) / count)[:, :, None]
    slope = (tl.sum(of_product * gain, axis=2) / count)[:, :, None]
    for start in range(first, end, ROWS):
        at, mask = _rows(start, end, channels, channel, there, ROWS)
        normal, g = _gradient_at(grad, x, at, mask, mean, scale, gain, shift, SILU)
        result = (g * gain - level - normal * slope) * scale
        tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


def launch_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """x (B, C, H, W), channels-last or made so. Returns: the result like x, and float32 (B, groups, 2): each group's
    mean and 1/standard deviation."""
    x = x.contiguous(memory_format=torch.channels_last)
    tiling = Tiling.of(x, groups)
    programs, sizes, tile = len(x) * tiling.programs, tiling.sizes, tiling.tile
    out = torch.empty_like(x, memory_format=torch.channels_last)
    moments = statistics = x.new_empty((len(x), groups, 2), dtype=torch.float32)
    if tiling.parts > 1:
        moments = x.new_empty((len(x), tiling.parts, groups, 2), dtype=torch.float32)
        launch(part_moments_kernel, programs, moments, x, *sizes, **tile, fuse=True)
    constants = {"SILU": silu, **tiling.variant, **tile}
    arguments = (statistics, moments, x, weight, bias, *sizes, eps)
    launch(normalize_kernel, programs, out, *arguments, **constants, fuse=True)
    return out, statistics


def launch_group_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """Gradients by x, like x, and by weight and bias, float32 (2, C)."""
    x = x.contiguous(memory_format=torch.channels_last)
    grad = grad.contiguous(memory_format=torch.channels_last)
    tiling = Tiling.of(x, statistics.shape[1])
    programs, sizes, tile = len(x) * tiling.programs, tiling.sizes, tiling.tile
    out = torch.empty_like(x, memory_format=torch.channels_last)
    sums = x.new_empty((2, len(x), tiling.parts, x.shape[1]), dtype=torch.float32)
    arguments = (grad, x, weight, bias, statistics, *sizes)
    if tiling.parts > 1:
        launch(part_gradients_kernel, programs, sums, *arguments, SILU=silu, **tile, fuse=True)
    constants = {"SILU": silu, **tiling.variant, **tile}
    launch(gradient_kernel, programs, out, sums, *arguments, **constants, fuse=True)
    return out, sums.sum(dim=(1, 2))
