"""Dropout whose masks are named: a pure function of (seed, training position, layer, place in the
activation)."""

from typing import Any

import torch
from torch import Tensor

from ddpm_pipeline.diffusion.noise import Stream, words32
from ddpm_pipeline.kernels import define_operator, on_gpu


class DropoutKeys:
    """What the masks of one batch are made from: two 32-bit words for each sample.

    Positions are unique over a training, so no two samples ever share a mask, and a sample's mask is the same
    whatever worker, batch or restart it is drawn in. Two words are drawn with Philox for each sample; within
    an activation they seed a 32-bit mixing function, ten times cheaper, each word of which decides two
    elements.
    """

    def __init__(self, seed: int, positions: Tensor) -> None:
        """seed: 0..2^63-1; positions: int64 (B,), the samples' places in the global training order."""
        # int32 (B, 1, 2): the words as torch keeps them, sign and all.
        self.words = words32(seed, Stream.TRAIN_DROPOUT, positions)[:, None, :2].to(torch.int32)


def keyed_dropout(x: Tensor, probability: float, keys: DropoutKeys, layer: int) -> Tensor:
    """x (B, C, H, W) with elements zeroed with `probability` and the others scaled to keep the mean.

    layer: a number of its own for each place in the network. Probability is met to 2^-17; the scale is that
    of the probability really used. The mask does not depend on x's memory format. A GPU computes it by one kernel,
    which also multiplies, once more in the backward pass: the mask is not stored.
    """
    threshold, layer_word = round(probability * 65536), _signed(0x9E3779B9 * (layer + 1))
    if on_gpu(x):
        return _KeyedDropout.apply(x, keys.words, threshold, layer_word)
    return _keyed_dropout(x, keys.words, threshold, layer_word)


def _keyed_dropout(x: Tensor, words: Tensor, threshold: int, layer_word: int) -> Tensor:
    batch, channels, height, width = x.shape
    count = channels * height * width
    mixed = _mix(words ^ layer_word)
    place = torch.arange((count + 1) // 2, dtype=torch.int32, device=x.device)
    bits = _mix(_mix(place[None] + mixed[..., 0]) ^ mixed[..., 1])
    lanes = torch.cat([bits & 0xFFFF, (bits >> 16) & 0xFFFF], dim=1)[:, :count]
    # Drawn channels-last, the layout the network runs in: the product below then reads both in memory order.
    keep = (lanes >= threshold).view(batch, height, width, channels).permute(0, 3, 1, 2)
    return x * (keep.to(x.dtype) * (65536 / (65536 - threshold)))


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words that scatters its input over all bits (Wellons 2018, "lowbias32").

    int32 products wrap around; shifts are masked because those of int32 copy the sign.
    """
    word = (word ^ ((word >> 16) & 0xFFFF)) * _signed(0x7FEB352D)
    word = (word ^ ((word >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return word ^ ((word >> 16) & 0xFFFF)


def _signed(word: int) -> int:
    """The int32 with the same bits as the low 32 of `word`."""
    return ((word + 2**31) & 0xFFFFFFFF) - 2**31


def _reference(x: Tensor, words: Tensor, threshold: int, layer_word: int) -> Tensor:
    return _keyed_dropout(x, words, threshold, layer_word).contiguous(memory_format=torch.channels_last)


def _launch(*arguments: Any) -> Tensor:
    from ddpm_pipeline.kernels.dropout_kernel import launch_keyed_dropout

    return launch_keyed_dropout(*arguments)


def _shape(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


class _KeyedDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, words: Tensor, threshold: int, layer_word: int) -> Tensor:
        ctx.words, ctx.threshold, ctx.layer_word = words, threshold, layer_word
        return _operator(x, words, threshold, layer_word)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _operator(gradients[0], ctx.words, ctx.threshold, ctx.layer_word), None, None, None


_operator = define_operator(
    "keyed_dropout(Tensor x, Tensor words, int threshold, int layer_word) -> Tensor",
    reference=_reference,
    launch=_launch,
    shapes=_shape,
)
