"""A small transformer over patches of an image, modulated by timestep and class (Peebles & Xie 2023, adaLN)."""

import torch
from torch import Tensor, nn

from ddpm_pipeline.config.net import PluginNetConfig
from ddpm_pipeline.nets import DropoutKeys
from ddpm_pipeline.nets.dropout import keyed_dropout
from ddpm_pipeline.nets.layers import timestep_embedding
from tiny_dit.doors import NetworkSettings


class Block(nn.Module):
    """Attention and a perceptron, each scaled, shifted and gated by the condition."""

    def __init__(self, width: int, layer: int, dropout: float) -> None:
        super().__init__()
        self.layer, self.dropout = layer, dropout
        self.modulation = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, condition: Tensor, dropout: DropoutKeys | None) -> Tensor:
        """x (B, N, D), condition (B, D)."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        y = self.norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(y, y, y, need_weights=False)[0]
        y = self.mlp(self.norm(x) * (1 + scale2) + shift2)
        if self.training and dropout is not None:
            y = keyed_dropout(y[:, None], self.dropout, dropout, self.layer)[:, 0]
        return x + gate2 * y


class TinyDiT(nn.Module):
    """`net(x, t, class_labels=None, dropout=None)`."""

    def __init__(self, net: PluginNetConfig, settings: NetworkSettings) -> None:
        super().__init__()
        self.width, self.num_classes = settings.width, net.num_classes
        self.embed = nn.Conv2d(net.in_channels, settings.width, settings.patch, settings.patch)
        self.place = nn.Parameter(
            0.02 * torch.randn(1, (net.image_size // settings.patch) ** 2, settings.width)
        )
        self.time = nn.Linear(settings.width, settings.width)
        self.classes = nn.Embedding(net.num_embeddings, settings.width) if net.num_embeddings else None
        self.layers = nn.ModuleList(Block(settings.width, i, net.dropout) for i in range(settings.depth))
        self.head = nn.Linear(settings.width, net.out_channels * settings.patch**2)
        self.fold = nn.PixelShuffle(settings.patch)

    def blocks(self) -> list[nn.Module]:
        """What FSDP collects together."""
        return list(self.layers)

    def forward(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, dropout: DropoutKeys | None = None
    ) -> Tensor:
        """x (B, C, H, W), t (B,), class_labels (B,)."""
        grid = self.embed(x)
        condition = self.time(timestep_embedding(t, self.width, True, 0).to(grid.dtype))
        if self.classes is not None and class_labels is None:
            class_labels = torch.full_like(t, self.num_classes or 0, dtype=torch.int64)
        if self.classes is not None and class_labels is not None:
            condition = condition + self.classes(class_labels)
        tokens = grid.flatten(2).transpose(1, 2) + self.place
        for layer in self.layers:
            tokens = layer(tokens, condition, dropout)
        return self.fold(self.head(tokens).transpose(1, 2).reshape(len(x), -1, *grid.shape[2:]))


def build(net: PluginNetConfig, settings: NetworkSettings) -> nn.Module:
    """The entry point's code."""
    return TinyDiT(net, settings)
