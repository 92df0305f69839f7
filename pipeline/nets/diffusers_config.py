"""Our settings as diffusers' settings and back. A setting that the other side cannot express is rejected by name."""

from collections.abc import Mapping
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddpm_pipeline.config.diffusion import ObjectiveConfig, ScheduleConfig, Target, Variance
from ddpm_pipeline.config.json_document import first_fault
from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.diffusion.schedule import NoiseSchedule
from ddpm_pipeline.errors import UserError

_TARGETS: dict[Target, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_VARIANCES: dict[Variance, str] = {
    "fixed-small": "fixed_small",
    "fixed-large": "fixed_large",
    "learned": "learned_range",
}
# UNet2DModel's settings that change what is computed, with the values this network shares.
_NET_SHARED: dict[str, tuple[object, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
    "downsample_padding": (0, 1),
}
_NET_IGNORED = ("num_train_timesteps",)
_Widths = Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)]


class _TheirNet(BaseModel):
    """The settings read from a `UNet2DModel`'s config.json, with the defaults for those that older versions omit."""

    model_config = ConfigDict(strict=True)

    sample_size: object = None
    in_channels: int = 3
    out_channels: int = 3
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: list[str] = ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"]
    up_block_types: list[str] = ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    block_out_channels: _Widths = [224, 448, 672, 896]
    layers_per_block: int = 2
    dropout: float = 0.0
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    add_attention: bool = True
    num_class_embeds: int | None = None
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    resnet_time_scale_shift: str = "default"
    downsample_padding: int = 1


class _TheirScheduler(BaseModel):
    """The settings read from a scheduler_config.json, with diffusers' defaults."""

    model_config = ConfigDict(strict=True)

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    trained_betas: list[float] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"
    thresholding: bool = False


_M = TypeVar("_M", bound=BaseModel)
# Kind of block: (with attention, resolution changed inside a residual block or None for "as the type says").
_DOWN_BLOCKS = {
    "DownBlock2D": (False, False),
    "ResnetDownsampleBlock2D": (False, True),
    "AttnDownBlock2D": (True, None),
}
_UP_BLOCKS = {
    "UpBlock2D": (False, False),
    "ResnetUpsampleBlock2D": (False, True),
    "AttnUpBlock2D": (True, None),
}


def net_to_diffusers(config: UNetConfig) -> dict[str, object]:
    """The arguments of a `UNet2DModel` that computes the same. UserError names what it cannot express."""
    if config.multipliers[0] != 1:
        raise UserError(
            f"net.multipliers begins with {config.multipliers[0]:g}: a diffusers UNet2DModel sizes its timestep "
            "embedding by the first level, so only a network whose first multiplier is 1 can be exported"
        )
    attends = [size in config.attention_resolutions for size in config.level_sizes]
    plain = "Resnet{}sampleBlock2D" if config.resblock_updown else "{}Block2D"
    down = ["AttnDownBlock2D" if a else plain.format("Down") for a in attends]
    up = ["AttnUpBlock2D" if a else plain.format("Up") for a in reversed(attends)]
    resample = "resnet" if config.resblock_updown else "conv"
    return {
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "freq_shift": config.time_freq_shift,
        "flip_sin_to_cos": config.time_cos_first,
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": up,
        "block_out_channels": list(config.level_channels),
        "layers_per_block": config.num_res_blocks,
        "mid_block_scale_factor": 1,
        "downsample_padding": config.downsample_padding,
        "downsample_type": resample,
        "upsample_type": resample,
        "dropout": config.dropout,
        "act_fn": "silu",
        "attention_head_dim": _head_dim(config, attends),
        "norm_num_groups": config.norm_groups,
        # Left out, scale-shift networks would lose the norm before the middle attention.
        "attn_norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "add_attention": config.mid_attention,
        "class_embed_type": None,
        "num_class_embeds": config.num_embeddings or None,
    }


def _head_dim(config: UNetConfig, attends: list[bool]) -> int | None:
    """Channels a head, or None for one head everywhere: diffusers has one number for all levels."""
    if config.head_dim is not None or config.num_heads == 1:
        return config.head_dim
    widths = {width for width, a in zip(config.level_channels, attends, strict=True) if a}
    widths |= {config.level_channels[-1]} if config.mid_attention else set()
    if len(widths) > 1:
        raise UserError(
            f"net.num_heads {config.num_heads} means heads of different widths at {sorted(widths)} channels, which a "
            "diffusers UNet2DModel cannot express; only a network with head_dim or one head can be exported"
        )
    return next(iter(widths), config.num_heads) // config.num_heads


def net_from_diffusers(theirs: Mapping[str, Any], where: str) -> UNetConfig:
    """The network of a `UNet2DModel`'s config.json. UserError names the setting of `where` it cannot express."""
    _only_shared(theirs, where)
    given = _checked(_TheirNet, theirs, where)
    size = given.sample_size
    if not isinstance(size, int):
        _refuse(where, "sample_size", size, "one number of pixels is needed")
    widths = given.block_out_channels
    attends, resblock_updown = _blocks(given, where)
    scale_shift = given.resnet_time_scale_shift == "scale_shift"
    groups, mid_groups = given.norm_num_groups, given.attn_norm_num_groups
    if given.add_attention and mid_groups != groups and (mid_groups is not None or scale_shift):
        _refuse(
            where, "attn_norm_num_groups", mid_groups, f"the middle attention must have {groups} groups too"
        )
    try:
        return UNetConfig(
            image_size=size,
            in_channels=given.in_channels,
            out_channels=given.out_channels,
            base_channels=widths[0],
            multipliers=tuple(width / widths[0] for width in widths),
            num_res_blocks=given.layers_per_block,
            attention_resolutions=tuple(size // 2**i for i, a in enumerate(attends) if a),
            mid_attention=given.add_attention,
            head_dim=given.attention_head_dim,
            dropout=given.dropout,
            num_classes=given.num_class_embeds,
            scale_shift_norm=scale_shift,
            resblock_updown=resblock_updown,
            downsample_padding=1 if resblock_updown else given.downsample_padding,
            norm_groups=groups,
            norm_eps=given.norm_eps,
            time_cos_first=given.flip_sin_to_cos,
            time_freq_shift=given.freq_shift,
        )
    except ValidationError as error:
        raise UserError(f"{where}: {first_fault(error)}") from None


def _only_shared(theirs: Mapping[str, Any], where: str) -> None:
    for name, value in theirs.items():
        if name in _NET_SHARED and value not in _NET_SHARED[name]:
            wanted = " or ".join(repr(v) for v in _NET_SHARED[name])
            _refuse(where, name, value, f"this network has only {wanted}")
        known = (
            name in _NET_SHARED
            or name in _TheirNet.model_fields
            or name in _NET_IGNORED
            or name.startswith("_")
        )
        if not known and value is not None:
            _refuse(where, name, value, "the setting is unknown here")
    if theirs.get("_class_name", "UNet2DModel") != "UNet2DModel":
        _refuse(where, "_class_name", theirs["_class_name"], "only UNet2DModel can be imported")


def _blocks(given: _TheirNet, where: str) -> tuple[list[bool], bool]:
    """Which levels attend, and whether residual blocks change the resolution."""
    attends: dict[str, list[bool]] = {}
    inside: set[bool] = set()
    for side, kinds, names, change in (
        ("down", _DOWN_BLOCKS, given.down_block_types, given.downsample_type),
        ("up", _UP_BLOCKS, given.up_block_types, given.upsample_type),
    ):
        if len(names) != len(given.block_out_channels):
            _refuse(where, f"{side}_block_types", names, "block_out_channels has another number of levels")
        by_type = change == "resnet"
        for place, name in enumerate(names):
            if name not in kinds:
                _refuse(where, f"{side}_block_types", name, f"known are {', '.join(kinds)}")
            # The last block of either side has no change of resolution, so there its kind means nothing.
            if place + 1 < len(names):
                resnet = kinds[name][1]
                inside.add(by_type if resnet is None else resnet)
        attends[side] = [kinds[name][0] for name in names]
    if attends["down"] != attends["up"][::-1]:
        _refuse(where, "up_block_types", given.up_block_types, "attention must mirror down_block_types")
    if len(inside) > 1:
        _refuse(where, "down_block_types", given.down_block_types, "all levels must change resolution alike")
    return attends["down"], inside == {True}


def scheduler_to_diffusers(
    schedule: ScheduleConfig, objective: ObjectiveConfig, distilled: bool = False
) -> dict[str, object]:
    """The arguments of a `DDPMScheduler` of the same process, which DDIM's and DPM-Solver's can be made from.

    distilled: of an `LCMScheduler`, which draws the same images as sampler "consistency" where num_steps divides the
    schedule's. UserError for what it cannot express.
    """
    result: dict[str, object] = {
        "_class_name": "LCMScheduler" if distilled else "DDPMScheduler",
        "num_train_timesteps": schedule.num_steps,
        "clip_sample": True,
        "prediction_type": _TARGETS[objective.target],
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
    }
    if not distilled:
        result["variance_type"] = _VARIANCES[objective.variance]
    elif objective.variance == "learned":
        raise UserError(
            "objective.variance learned: diffusers' LCMScheduler takes no network that predicts a variance, so this "
            "distilled model cannot be exported"
        )
    else:
        result["original_inference_steps"] = schedule.num_steps
    if schedule.kind in ("linear", "scaled-linear"):
        result |= {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
        result["beta_schedule"] = schedule.kind.replace("-", "_")
    elif schedule == ScheduleConfig(
        kind="cosine", num_steps=schedule.num_steps, zero_terminal_snr=schedule.zero_terminal_snr
    ):
        result["beta_schedule"] = "squaredcos_cap_v2"
    else:
        bare = schedule.model_copy(update={"zero_terminal_snr": False})
        result["trained_betas"] = NoiseSchedule.from_config(bare).betas.tolist()
    return result


def schedule_from_diffusers(theirs: Mapping[str, Any], where: str) -> ScheduleConfig:
    """The schedule of a scheduler_config.json. UserError names what it cannot express."""
    given = _checked(_TheirScheduler, theirs, where)
    steps, kind, betas = given.num_train_timesteps, given.beta_schedule, given.trained_betas
    zero = given.rescale_betas_zero_snr
    known = ("linear", "scaled_linear", "squaredcos_cap_v2")
    if betas is None and kind not in known:
        _refuse(where, "beta_schedule", kind, f"known are {', '.join(known)} and trained_betas")
    try:
        if betas is not None:
            return ScheduleConfig(
                kind="given", num_steps=len(betas), betas=tuple(betas), zero_terminal_snr=zero
            )
        if kind == "squaredcos_cap_v2":
            return ScheduleConfig(kind="cosine", num_steps=steps, zero_terminal_snr=zero)
        return ScheduleConfig(
            kind="linear" if kind == "linear" else "scaled-linear",
            num_steps=steps,
            beta_start=given.beta_start,
            beta_end=given.beta_end,
            zero_terminal_snr=zero,
        )
    except ValidationError as error:
        raise UserError(f"{where}: {first_fault(error)}") from None


def objective_from_diffusers(theirs: Mapping[str, Any], where: str, net: UNetConfig) -> ObjectiveConfig:
    """What the network's output means, from a scheduler_config.json and the number of its channels."""
    given = _checked(_TheirScheduler, theirs, where)
    prediction = given.prediction_type
    targets: list[Target] = [ours for ours, name in _TARGETS.items() if name == prediction]
    if not targets:
        _refuse(where, "prediction_type", prediction, f"known are {', '.join(_TARGETS.values())}")
    if given.thresholding:
        _refuse(where, "thresholding", True, "only clipping to [-1, 1] is known here")
    kind = given.variance_type.removesuffix("_log")
    variances: list[Variance] = [ours for ours, name in _VARIANCES.items() if name == kind]
    learns = net.out_channels == 2 * net.in_channels
    if not variances or learns != (variances[0] == "learned"):
        channels = f"the network has {net.out_channels} output channels"
        _refuse(where, "variance_type", kind, f"{channels}; known are {', '.join(_VARIANCES.values())}")
    return ObjectiveConfig(target=targets[0], variance=variances[0])


def _checked(kind: type[_M], theirs: Mapping[str, Any], where: str) -> _M:
    """Their settings with the types they must have. UserError names the first that has another."""
    try:
        return kind.model_validate(dict(theirs))
    except ValidationError as error:
        raise UserError(f"{where}: {first_fault(error)}") from None


def _refuse(where: str, name: str, value: object, why: str) -> NoReturn:
    raise UserError(f"{where}: {name} is {value!r}: {why}, so it cannot be imported")
