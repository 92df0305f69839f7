# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportGeneralTypeIssues=false
# Triton compiles the functions marked `triton.jit` from their source and gives their parameters types of its own.
"""Triton kernel of keyed dropout: bit for bit `ddpm_pipeline.nets.dropout`, which defines it.

The mask is never stored: forward and backward compute it from the keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_pipeline.kernels.launching import launch, signed

BLOCK = 1024


@triton.jit
def _mix(word):
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _multiply(out, x, place, lane, threshold, scale, mask):
    value = tl.load(x + place, mask=mask)
    # The scale as a number of x's type, and one more rounding: as the reference multiplies.
    factor = tl.where(lane.to(tl.int32) >= threshold, scale, 0.0).to(value.dtype)
    tl.store(out + place, (value.to(tl.float32) * factor.to(tl.float32)).to(value.dtype), mask=mask)


@triton.jit(do_not_specialize=["layer_word", "threshold"])
def keyed_dropout_kernel(
    out, x, words, layer_word, threshold, scale, count, half, tiles, BLOCK: tl.constexpr
):
    """A sample's `count` values in channels-last order. A program computes BLOCK words; the low 16 bits of each decide
    a value of the first half, the high ones the value `half` places after it."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    layer = layer_word.to(tl.uint32, bitcast=True)
    key0 = _mix(tl.load(words + 2 * row).to(tl.uint32, bitcast=True) ^ layer)
    key1 = _mix(tl.load(words + 2 * row + 1).to(tl.uint32, bitcast=True) ^ layer)
    place = tile * BLOCK + tl.arange(0, BLOCK)
    bits = _mix(_mix(place.to(tl.uint32) + key0) ^ key1)
    out += row * count
    x += row * count
    _multiply(out, x, place, bits & 0xFFFF, threshold, scale, place < half)
    _multiply(out, x, place + half, bits >> 16, threshold, scale, place + half < count)


def launch_keyed_dropout(x: Tensor, words: Tensor, threshold: int, layer_word: int) -> Tensor:
    """x (B, C, H, W), channels-last or made so, with the elements dropped that the words (B, 1, 2) name."""
    x, words = x.contiguous(memory_format=torch.channels_last), words.contiguous()
    out = torch.empty_like(x, memory_format=torch.channels_last)
    count = x.numel() // max(1, len(x))
    half = (count + 1) // 2
    tiles = -(-half // BLOCK)
    launch(
        keyed_dropout_kernel,
        len(x) * tiles,
        out,
        x,
        words,
        signed(layer_word),
        threshold,
        65536 / (65536 - threshold),
        count,
        half,
        tiles,
        BLOCK=BLOCK,
        fuse=False,
    )
    return out
