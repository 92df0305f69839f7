"""The parts of the U-Net. All feature maps are (B, C, H, W), the embedding of timestep and class is (B,
E)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_pipeline.devices import divided
from ddpm_pipeline.nets.dropout import DropoutKeys, keyed_dropout
from ddpm_pipeline.nets.group_norm import GroupNorm32


@dataclass(frozen=True)
class BlockOptions:
    """What the blocks of one network have in common."""

    embedding: int
    groups: int
    eps: float
    dropout: float
    scale_shift: bool


def timestep_embedding(t: Tensor, size: int, cos_first: bool = True, freq_shift: int = 0) -> Tensor:
    """Sines and cosines of t at `size`/2 frequencies from 1 to about 1/10000 (Vaswani et al. 2017, section
    3.5).

    t: (B,), whole or fractional; returns float32 (B, size). Frequencies are 10000^(-i / (size/2 -
    freq_shift)); code bases differ in that shift and in the order, which matters for weights that move
    between them.
    """
    half = size // 2
    places = torch.arange(half, dtype=torch.float32, device=t.device)
    exponents = divided(places, max(1, half - freq_shift))
    angles = t.to(torch.float32)[:, None] * torch.exp(-math.log(10000.0) * exponents)[None]
    parts = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)


class ResBlock(nn.Module):
    """norm, SiLU, (resample), conv, + timestep, norm, SiLU, dropout, conv, added to the (resampled) input.

    DDPM's block, with improved and guided diffusion's options. `layer` names its dropout mask.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        options: BlockOptions,
        layer: int,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.options, self.layer = options, layer
        self.norm1 = GroupNorm32(options.groups, in_channels, options.eps)
        self.resample = nn.Identity() if resample is None else resample
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.project = nn.Linear(options.embedding, out_channels * (2 if options.scale_shift else 1))
        self.norm2 = GroupNorm32(options.groups, out_channels, options.eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor, dropout: DropoutKeys | None) -> Tensor:
        h = self.conv1(self.resample(self.norm1(x, silu=True)))
        condition = self.project(F.silu(embedding))[:, :, None, None]
        if self.options.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = F.silu(self.norm2(h) * (1 + scale) + shift)
        else:
            h = self.norm2(h + condition, silu=True)
        if self.training and self.options.dropout > 0 and dropout is not None:
            h = keyed_dropout(h, self.options.dropout, dropout, self.layer)
        return self.shortcut(self.resample(x)) + self.conv2(h)


class Attention(nn.Module):
    """Self-attention over all places of a feature map, added to it; scale 1/sqrt(channels a head)."""

    def __init__(self, channels: int, heads: int, options: BlockOptions) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm32(options.groups, channels, options.eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        split = self.qkv(tokens).view(batch, height * width, 3, self.heads, channels // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(tokens.shape)
        return x + self.out(mixed).transpose(1, 2).view(x.shape)


class Downsample(nn.Module):
    """Half the resolution by a strided convolution."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, embedding: Tensor, dropout: DropoutKeys | None) -> Tensor:
        # Without padding all round, one row and column at the end keep the size exactly half.
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution: each pixel repeated, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor, dropout: DropoutKeys | None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
