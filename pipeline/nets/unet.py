"""The U-Net: DDPM's network (Ho et al. 2020, appendix B) with improved and guided diffusion's options."""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.nets.dropout import DropoutKeys
from ddpm_pipeline.nets.group_norm import GroupNorm32
from ddpm_pipeline.nets.layers import (
    Attention,
    BlockOptions,
    Downsample,
    ResBlock,
    Upsample,
    timestep_embedding,
)


class Stage(nn.Module):
    """A residual block and the attention after it, the unit that gradient checkpointing recomputes."""

    def __init__(self, block: ResBlock, attention: Attention | None = None) -> None:
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x: Tensor, embedding: Tensor, dropout: DropoutKeys | None) -> Tensor:
        x = self.block(x, embedding, dropout)
        return x if self.attention is None else self.attention(x)


class Level(nn.Module):
    """The stages of one resolution on the way down or up, and the change to the next one, if there is one."""

    def __init__(self, stages: list[Stage], resample: nn.Module | None) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.resample = resample


class UNet(nn.Module):
    """`net(x, t, class_labels=None, dropout=None)`: noisy images and timesteps to the prediction.

    Parameters are drawn from torch's global generator; `nets.seeded_init` makes them a function of a seed. The
    last convolution, every residual block's second and every attention's projection start at zero, so a fresh
    network predicts zero. Computes in the precision of its weights or of the surrounding autocast, norms in
    float32; runs fastest as `net.to(memory_format=torch.channels_last)`.
    """

    def __init__(self, config: UNetConfig, checkpoint: bool = False) -> None:
        """checkpoint: recompute each stage in the backward pass instead of keeping its activations."""
        super().__init__()
        self.config, self.checkpoint = config, checkpoint
        embedding = 4 * config.base_channels
        self._options = BlockOptions(
            embedding, config.norm_groups, config.norm_eps, config.dropout, config.scale_shift_norm
        )
        self._num_blocks = 0
        self.time = nn.Sequential(
            nn.Linear(config.base_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        rows = config.num_embeddings
        self.classes = _embedding(rows, embedding) if rows else None
        widths = config.level_channels
        self.stem = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        skips = [widths[0]]
        self.down = nn.ModuleList(self._down_levels(skips))
        self.middle = nn.ModuleList(
            [
                Stage(self._block(widths[-1], widths[-1]), self._attention(widths[-1], config.mid_attention)),
                Stage(self._block(widths[-1], widths[-1])),
            ]
        )
        self.up = nn.ModuleList(self._up_levels(skips))
        self.norm = GroupNorm32(config.norm_groups, widths[0], config.norm_eps)
        self.head = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self._initialise()

    @property
    def null_label(self) -> int | None:
        """The label that means "no class", or None where the network has none."""
        return self.config.null_label

    def blocks(self) -> list[nn.Module]:
        """What FSDP collects together: stages and changes of resolution."""
        found: list[nn.Module] = []
        for module in self.modules():
            if isinstance(module, Stage):
                found.append(module)
            elif isinstance(module, Level) and module.resample is not None:
                found.append(module.resample)
        return found

    def forward(
        self,
        x: Tensor,
        t: Tensor | int,
        class_labels: Tensor | None = None,
        dropout: DropoutKeys | None = None,
    ) -> Tensor:
        """x: float (B, in_channels, H, W), H and W multiples of 2^(levels-1); t: (B,) or one for all, whole
        or fractional; class_labels: int64 (B,), where the network has classes; without them it takes "no
        class". dropout: the batch's keys, needed in training mode where config.dropout is above 0.

        Returns: (B, out_channels, H, W). Raises: ValueError naming the argument.
        """
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"x must be (B, {self.config.in_channels}, H, W), not {tuple(x.shape)}")
        coarsest = 2 ** (len(self.config.multipliers) - 1)
        if x.shape[2] % coarsest or x.shape[3] % coarsest:
            raise ValueError(
                f"x must have height and width that are multiples of {coarsest}, not {tuple(x.shape)}"
            )
        if self.training and self.config.dropout > 0 and dropout is None:
            raise ValueError(
                "dropout keys are needed in training mode: masks are named, not drawn by history"
            )
        embedding = self._embed(x, t, class_labels)
        x = self.stem(x)
        skips = [x]
        for level in cast(Iterable[Level], self.down):
            for stage in level.stages:
                x = self._run(stage, x, embedding, dropout)
                skips.append(x)
            if level.resample is not None:
                x = self._run(level.resample, x, embedding, dropout)
                skips.append(x)
        for stage in self.middle:
            x = self._run(stage, x, embedding, dropout)
        for level in cast(Iterable[Level], self.up):
            for stage in level.stages:
                x = self._run(stage, torch.cat([x, skips.pop()], dim=1), embedding, dropout)
            if level.resample is not None:
                x = self._run(level.resample, x, embedding, dropout)
        return self.head(self.norm(x, silu=True))

    def _embed(self, x: Tensor, t: Tensor | int, class_labels: Tensor | None) -> Tensor:
        config = self.config
        times = torch.as_tensor(t, device=x.device).expand(len(x)) if _is_single(t) else torch.as_tensor(t)
        if times.shape != (len(x),):
            raise ValueError(f"t must have shape ({len(x)},), not {tuple(times.shape)}")
        waves = timestep_embedding(times, config.base_channels, config.time_cos_first, config.time_freq_shift)
        embedding = self.time(waves.to(self.stem.weight.dtype))
        if self.classes is None:
            if class_labels is not None:
                raise ValueError("class_labels given to a network without classes")
            return embedding
        if class_labels is None:
            if config.null_label is None:
                raise ValueError('class_labels are needed: the network has classes and no "no class" label')
            class_labels = torch.full_like(times, config.null_label, dtype=torch.int64)
        if class_labels.shape != (len(x),):
            raise ValueError(f"class_labels must have shape ({len(x)},), not {tuple(class_labels.shape)}")
        return embedding + self.classes(class_labels)

    def _run(self, module: nn.Module, x: Tensor, embedding: Tensor, dropout: DropoutKeys | None) -> Tensor:
        if self.checkpoint and torch.is_grad_enabled():
            # No generator is used inside, so none has to be saved.
            return recompute(module, x, embedding, dropout, use_reentrant=False, preserve_rng_state=False)
        return module(x, embedding, dropout)

    def _down_levels(self, skips: list[int]) -> Iterator[Level]:
        """The levels on the way down; notes the width of every feature map that the way up will meet
        again."""
        config, width = self.config, self.config.level_channels[0]
        for level, out in enumerate(config.level_channels):
            stages: list[Stage] = []
            for _ in range(config.num_res_blocks):
                stages.append(self._stage(width, out, level))
                width = out
                skips.append(out)
            last = level + 1 == len(config.multipliers)
            if not last:
                skips.append(out)
            yield Level(stages, None if last else self._downsample(out))

    def _up_levels(self, skips: list[int]) -> Iterator[Level]:
        config, width = self.config, self.config.level_channels[-1]
        for level, out in reversed(list(enumerate(config.level_channels))):
            stages: list[Stage] = []
            for _ in range(config.num_res_blocks + 1):
                stages.append(self._stage(width + skips.pop(), out, level))
                width = out
            yield Level(stages, self._upsample(out) if level else None)

    def _stage(self, width: int, out: int, level: int) -> Stage:
        attends = self.config.level_sizes[level] in self.config.attention_resolutions
        return Stage(self._block(width, out), self._attention(out, attends))

    def _block(self, width: int, out: int, resample: nn.Module | None = None) -> ResBlock:
        layer, self._num_blocks = self._num_blocks, self._num_blocks + 1
        return ResBlock(width, out, self._options, layer, resample)

    def _attention(self, width: int, wanted: bool) -> Attention | None:
        return Attention(width, self.config.heads(width), self._options) if wanted else None

    def _downsample(self, width: int) -> nn.Module:
        if self.config.resblock_updown:
            return self._block(width, width, nn.AvgPool2d(2))
        return Downsample(width, self.config.downsample_padding)

    def _upsample(self, width: int) -> nn.Module:
        if self.config.resblock_updown:
            return self._block(width, width, nn.Upsample(scale_factor=2.0, mode="nearest"))
        return Upsample(width)

    def _initialise(self) -> None:
        """Uniform with variance 1 / fan average (DDPM's), biases 0; what ends a residual branch starts at
        0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType] - every layer here has a bias
        ends = [m.conv2 for m in self.modules() if isinstance(m, ResBlock)]
        for end in (*ends, *(m.out for m in self.modules() if isinstance(m, Attention)), self.head):
            nn.init.zeros_(end.weight)


def build(net: UNetConfig, settings: UNetConfig) -> UNet:
    """The U-Net as a kind of network: its settings are those of the group `net`."""
    return UNet(settings)


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Normal numbers, as torch's own module draws them; on the meta device none.

    There torch's would import its compiler to draw them: two seconds for each process that asks for a network's size.
    """
    weight = torch.empty(rows, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding.from_pretrained(weight, freeze=False)


def _is_single(t: Tensor | int) -> bool:
    return not isinstance(t, Tensor) or t.ndim == 0 or t.shape == (1,)
