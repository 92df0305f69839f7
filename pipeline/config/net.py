"""Settings of the network: everything that decides its parameters, their shapes and what they compute."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.plugins import NETWORKS, PluginIdentity, WithPlugin, with_identity

UNET = "unet"


class UNetConfig(Settings):
    """A U-Net over square images. Two configs with the same digest are the same function of the same
    weights."""

    image_size: Annotated[int, Field(ge=1, le=8192)] = 32
    """Height and width in pixels."""
    in_channels: Annotated[int, Field(ge=1, le=4096)] = 3
    """Channels of the image."""
    out_channels: Annotated[int, Field(ge=1, le=4096)] = 3
    """Channels of the prediction: those of the image, or twice as many when the variance is learned too."""
    base_channels: Annotated[int, Field(ge=2, le=8192, multiple_of=2)] = 128
    """Width that the multipliers scale; also the size of the timestep's sinusoidal embedding."""
    multipliers: Annotated[
        tuple[Annotated[float, Field(gt=0, le=64)], ...], Field(min_length=1, max_length=14)
    ] = (
        1.0,
        2.0,
        2.0,
        2.0,
    )
    """Width of each level over `base_channels`, finest first; each level halves the resolution."""
    num_res_blocks: Annotated[int, Field(ge=1, le=64)] = 2
    """Residual blocks a level on the way down; the way up has one more."""
    attention_resolutions: Annotated[tuple[int, ...], Field(max_length=14)] = (16,)
    """Resolutions in pixels whose residual blocks are followed by self-attention."""
    mid_attention: bool = True
    """Self-attention between the two residual blocks of the coarsest level."""
    num_heads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Attention heads; DDPM has one. Superseded by `head_dim`."""
    head_dim: Annotated[int, Field(ge=1, le=8192)] | None = None
    """Channels a head (guided diffusion: 64), the number of heads following from the width; None:
    `num_heads`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of zeroing an activation before a residual block's second convolution. DDPM on CIFAR-10:
    0.1."""
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Number of class labels the network is told; None is unconditional."""
    null_class: bool = False
    """Learn one more embedding, label `num_classes`, for "no class": what classifier-free guidance needs."""
    scale_shift_norm: bool = False
    """The timestep scales and shifts the second normalisation (improved DDPM) instead of being added before
    it."""
    resblock_updown: bool = False
    """Change resolution inside a residual block (guided diffusion) instead of by a convolution."""
    downsample_padding: Annotated[int, Field(ge=0, le=1)] = 1
    """Padding of the strided convolution: 1 on all sides, or 0: one row and column at the end only (DDPM)."""
    norm_groups: Annotated[int, Field(ge=1, le=8192)] = 32
    """Groups of the group normalisation."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the variance in a group normalisation; DDPM's network has 1e-6."""
    time_cos_first: bool = True
    """Order of the timestep embedding: cosines first (guided diffusion) or sines first (DDPM)."""
    time_freq_shift: Annotated[int, Field(ge=0, le=1)] = 0
    """Frequencies 10000^(-i / (half - shift)): 0 for guided diffusion, 1 for DDPM."""

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Width of each level, finest first."""
        return tuple(round(self.base_channels * m) for m in self.multipliers)

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Resolution of each level in pixels, finest first."""
        return tuple(self.image_size // 2**level for level in range(len(self.multipliers)))

    @property
    def num_embeddings(self) -> int:
        """Rows of the class embedding: the classes, and "no class" where it is learned; 0 if
        unconditional."""
        return 0 if self.num_classes is None else self.num_classes + int(self.null_class)

    @property
    def null_label(self) -> int | None:
        """The label that means "no class", or None where the network has none."""
        return self.num_classes if self.null_class else None

    def heads(self, channels: int) -> int:
        """Number of attention heads at a width of `channels`."""
        return self.num_heads if self.head_dim is None else channels // self.head_dim

    def digest(self) -> str:
        """SHA-256 over the canonical JSON of all fields, as 64 hexadecimal digits."""
        return _digest(self)

    @classmethod
    def ddpm_cifar10(cls) -> Self:
        """Ho et al. 2020, appendix B, for 32x32: 35,746,307 parameters."""
        return cls(image_size=32, multipliers=(1, 2, 2, 2), dropout=0.1)._as_in_ddpm()

    @classmethod
    def ddpm_256(cls) -> Self:
        """Ho et al. 2020, appendix B, for 256x256 (LSUN, CelebA-HQ): 113,673,219 parameters."""
        return cls(image_size=256, multipliers=(1, 1, 2, 2, 4, 4))._as_in_ddpm()

    def _as_in_ddpm(self) -> Self:
        """The same network with the conventions of the DDPM code base, which weights ported from it need."""
        return self.model_copy(
            update={
                "downsample_padding": 0,
                "norm_eps": 1e-6,
                "time_cos_first": False,
                "time_freq_shift": 1,
            }
        )

    @model_validator(mode="before")
    @classmethod
    def _without_kind(cls, data: Any) -> Any:
        """`kind: unet` may be said, and is not stored: networks were U-Nets before there were others."""
        if isinstance(data, Mapping) and data.get("kind") == UNET:
            return {name: value for name, value in cast(Mapping[str, Any], data).items() if name != "kind"}
        return data

    @field_validator("attention_resolutions")
    @classmethod
    def _in_one_order(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Finest first, each once: the digest must not depend on how the set was written."""
        return tuple(sorted(set(sizes), reverse=True))

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        halvings = len(self.multipliers) - 1
        if self.image_size % 2**halvings:
            raise ValueError(
                f"image_size {self.image_size} cannot be halved {halvings} times; "
                f"use a multiple of {2**halvings} or fewer multipliers"
            )
        for multiplier in self.multipliers:
            channels = self.base_channels * multiplier
            if abs(channels - round(channels)) > 1e-6 or round(channels) % self.norm_groups:
                raise ValueError(
                    f"multipliers: {multiplier} times base_channels {self.base_channels} is no multiple of "
                    f"norm_groups {self.norm_groups}"
                )
        for size in self.attention_resolutions:
            if size not in self.level_sizes:
                raise ValueError(
                    f"attention_resolutions: {size} has no effect, levels are at {self.level_sizes}; drop it"
                )
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.head_dim is not None and self.num_heads != 1:
            raise ValueError("num_heads has no effect beside head_dim; leave it out")
        sizes_widths = zip(self.level_sizes, self.level_channels, strict=True)
        widths = {width for size, width in sizes_widths if size in self.attention_resolutions}
        widths |= {self.level_channels[-1]} if self.mid_attention else set()
        for width in sorted(widths):
            if width % (self.head_dim or self.num_heads):
                name = "num_heads" if self.head_dim is None else "head_dim"
                raise ValueError(f"{name} {self.head_dim or self.num_heads} does not divide {width} channels")
        return self

    @model_validator(mode="after")
    def _only_settings_that_act(self) -> Self:
        if self.null_class and self.num_classes is None:
            raise ValueError("null_class has no effect without num_classes; leave it out")
        if self.resblock_updown and self.downsample_padding != 1:
            raise ValueError("downsample_padding has no effect with resblock_updown; leave it out")
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"out_channels must be in_channels ({self.in_channels}) or, to learn the variance, twice that"
            )
        return self


class PluginNetConfig(WithPlugin):
    """A network of another package, over square images. What the pipeline has to know of it stands here; the rest are
    its own settings."""

    PLUGIN_GROUP: ClassVar[str] = NETWORKS

    kind: str = Field(min_length=1, max_length=250)
    """Its entry point in `ddpm_pipeline.networks`, or `module:object`. Without it, or as "unet", the network is a
    U-Net."""
    image_size: Annotated[int, Field(ge=1, le=8192)] = 32
    """Height and width in pixels."""
    in_channels: Annotated[int, Field(ge=1, le=4096)] = 3
    """Channels of the image."""
    out_channels: Annotated[int, Field(ge=1, le=4096)] = 3
    """Channels of the prediction: those of the image, or twice as many when the variance is learned too."""
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Number of class labels the network is told; None is unconditional."""
    null_class: bool = False
    """Learn one more embedding, label `num_classes`, for "no class": what classifier-free guidance needs."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Above 0 the network is given the keys that its dropout draws from."""
    settings: dict[str, Any] = Field(default_factory=dict[str, Any])
    """The plug-in's own settings."""
    plugin: PluginIdentity | None = None
    """Package and version; filled in where it is left out."""

    @model_validator(mode="before")
    @classmethod
    def _identified(cls, data: Any) -> Any:
        return with_identity(NETWORKS, data, UNET)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.null_class and self.num_classes is None:
            raise ValueError("null_class has no effect without num_classes; leave it out")
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"out_channels must be in_channels ({self.in_channels}) or, to learn the variance, twice that"
            )
        return self

    @property
    def num_embeddings(self) -> int:
        """Rows of the class embedding: the classes, and "no class" where it is learned; 0 if unconditional."""
        return 0 if self.num_classes is None else self.num_classes + int(self.null_class)

    @property
    def null_label(self) -> int | None:
        """The label that means "no class", or None where the network has none."""
        return self.num_classes if self.null_class else None

    def digest(self) -> str:
        """SHA-256 over the canonical JSON of all fields, as 64 hexadecimal digits."""
        return _digest(self)


NetConfig = UNetConfig | PluginNetConfig
"""The settings of a network: of the U-Net, or of another package's."""


def _form_of(value: Any) -> str:
    """Which of the two classes raw settings are for."""
    if isinstance(value, Mapping):
        return "[unet]" if cast(Mapping[str, Any], value).get("kind", UNET) in (UNET, None) else "[plugin]"
    return "[plugin]" if isinstance(value, PluginNetConfig) else "[unet]"


Net = Annotated[
    Annotated[UNetConfig, Tag("[unet]")] | Annotated[PluginNetConfig, Tag("[plugin]")],
    Discriminator(_form_of),
]
"""The type of a field that holds a `NetConfig`."""


def kind_of(net: NetConfig) -> str:
    """The kind of a network."""
    return UNET if isinstance(net, UNetConfig) else net.kind


def _digest(settings: Settings) -> str:
    canonical = json.dumps(settings.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
