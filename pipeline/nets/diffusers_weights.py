"""Exchange with diffusers: a `UNet2DModel` and its scheduler as JSON and safetensors, both ways.

What both can express is converted without loss; anything else is rejected by name. `ddpm.json` beside the diffusers
files keeps what they cannot express (a "no class" label, the weighting of the loss) and is checked against them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.diffusion import ObjectiveConfig, ScheduleConfig
from ddpm_pipeline.config.model_card import DistillationInfo
from ddpm_pipeline.config.net import UNetConfig
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.nets.diffusers_config import (
    net_from_diffusers,
    net_to_diffusers,
    objective_from_diffusers,
    schedule_from_diffusers,
    scheduler_to_diffusers,
)
from ddpm_pipeline.nets.unet import UNet

_VERSION = "0.42.1"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_OWN = "ddpm.json"

# Ours on the left, theirs on the right; anchored, tried in order on the front part of a name.
_PLACES = (
    (r"time\.0", "time_embedding.linear_1"),
    (r"time\.2", "time_embedding.linear_2"),
    (r"classes", "class_embedding"),
    (r"stem", "conv_in"),
    (r"norm", "conv_norm_out"),
    (r"head", "conv_out"),
    (r"down\.(\d+)\.stages\.(\d+)\.block", r"down_blocks.\1.resnets.\2"),
    (r"down\.(\d+)\.stages\.(\d+)\.attention", r"down_blocks.\1.attentions.\2"),
    (r"down\.(\d+)\.resample", r"down_blocks.\1.downsamplers.0"),
    (r"middle\.(\d+)\.block", r"mid_block.resnets.\1"),
    (r"middle\.0\.attention", "mid_block.attentions.0"),
    (r"up\.(\d+)\.stages\.(\d+)\.block", r"up_blocks.\1.resnets.\2"),
    (r"up\.(\d+)\.stages\.(\d+)\.attention", r"up_blocks.\1.attentions.\2"),
    (r"up\.(\d+)\.resample", r"up_blocks.\1.upsamplers.0"),
)
_PARTS = {"project": "time_emb_proj", "shortcut": "conv_shortcut", "out": "to_out.0"}
# Attention's names before diffusers 0.16, still in the published DDPM weights.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class ExchangeNotes(Settings):
    """`ddpm.json`: our complete settings."""

    net: UNetConfig
    """The network's architecture."""
    schedule: ScheduleConfig
    """The noise schedule it was trained with."""
    objective: ObjectiveConfig
    """What its output means."""
    distillation: DistillationInfo | None = None
    """How it was distilled; None for a model of many steps."""


@dataclass(frozen=True)
class Imported:
    """A network read from a diffusers directory, and the process it was trained for."""

    net: UNet
    schedule: ScheduleConfig
    objective: ObjectiveConfig
    distillation: DistillationInfo | None = None


def export_diffusers(
    directory: Path,
    net: UNet,
    schedule: ScheduleConfig,
    objective: ObjectiveConfig,
    distillation: DistillationInfo | None = None,
) -> None:
    """Write `net` as a directory that `diffusers.DDPMPipeline.from_pretrained` loads; a distilled one samples with
    an `LCMScheduler`.

    Raises: UserError naming the setting that diffusers cannot express; nothing is written then.
    """
    net_config = net_to_diffusers(net.config)
    scheduler = scheduler_to_diffusers(schedule, objective, distilled=distillation is not None)
    for folder in ("unet", "scheduler"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in weights_to_diffusers(net.state_dict()).items()}
    save_file(tensors, directory / "unet" / _WEIGHTS, metadata={"format": "pt"})
    versioned = {"_diffusers_version": _VERSION}
    _write(directory / "unet" / "config.json", {"_class_name": "UNet2DModel", **versioned, **net_config})
    _write(directory / "scheduler" / "scheduler_config.json", {**versioned, **scheduler})
    notes = ExchangeNotes(net=net.config, schedule=schedule, objective=objective, distillation=distillation)
    _write(directory / _OWN, notes.model_dump(mode="json"))
    index = {
        "_class_name": "DDPMPipeline",
        **versioned,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    _write(directory / "model_index.json", index)


def import_diffusers(directory: Path) -> Imported:
    """Read a directory of a diffusers pipeline (unet/, scheduler/) or of the older flat layout.

    Raises: UserError naming the missing file or the setting that this network cannot express; DamageError where the
    weights do not fit their configuration.
    """
    nested = (directory / "unet").is_dir()
    net_file = directory / "unet" / "config.json" if nested else directory / "config.json"
    folder = directory / "scheduler" if nested else directory
    scheduler_file = folder / "scheduler_config.json"
    theirs, scheduler = _read(net_file), _read(scheduler_file)
    config = net_from_diffusers(theirs, str(net_file))
    schedule = schedule_from_diffusers(scheduler, str(scheduler_file))
    objective = objective_from_diffusers(scheduler, str(scheduler_file), config)
    distillation = None
    if (directory / _OWN).exists():
        notes = _own_notes(directory, config, schedule, objective)
        config, schedule, objective = notes.net, notes.schedule, notes.objective
        distillation = notes.distillation
    with torch.random.fork_rng(devices=[]):
        net = UNet(config)
    weights = net_file.parent / _WEIGHTS
    net.load_state_dict(weights_from_diffusers(_load(weights), net.state_dict(), str(weights)))
    return Imported(net.eval(), schedule, objective, distillation)


def weights_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under diffusers' names; the fused qkv becomes three."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        for their_name, part in _split(name, value):
            result[their_name] = part.detach()
    return result


def weights_from_diffusers(
    theirs: Mapping[str, Tensor], template: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Diffusers' parameters under our names, float32, for a network whose state is like `template`.

    where: the file's name for messages. Raises: DamageError naming a missing, extra or misshapen tensor.
    """
    left = {_modern(name): value for name, value in theirs.items()}
    result: dict[str, Tensor] = {}
    for name, like in template.items():
        parts: list[Tensor] = []
        for their_name, part in _split(name, like):
            value = left.pop(their_name, None)
            if value is None:
                raise DamageError(f"{where}: tensor {their_name} is missing")
            # Linear layers were 1x1 convolutions in some old files.
            value = value.reshape(part.shape) if value.numel() == part.numel() else value
            if value.shape != part.shape:
                raise DamageError(f"{where}: {their_name} is {tuple(value.shape)}, not {tuple(part.shape)}")
            parts.append(value.to(torch.float32))
        result[name] = torch.cat(parts)
    for name in left:
        raise DamageError(f"{where}: tensor {name} belongs to no part of the network in config.json")
    return result


def _split(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """Their name or names for our parameter, each with its part of the value."""
    for ours, theirs in _PLACES:
        match = re.match(ours + r"\.", name)
        if match is None:
            continue
        front, rest = match.expand(theirs), name[match.end() :]
        part, dot, kind = rest.rpartition(".")
        if part == "qkv":
            return [(f"{front}.to_{x}.{kind}", v) for x, v in zip("qkv", value.chunk(3), strict=True)]
        if part == "norm" and front.split(".")[-2] == "attentions":
            part = "group_norm"
        return [(f"{front}.{_PARTS.get(part, part)}{dot}{kind}", value)]
    raise ValueError(f"name {name} is not one of this network's parameters")


def _modern(name: str) -> str:
    parts = name.split(".")
    if "attentions" in parts and parts[-2] in _OLD_NAMES:
        parts[-2] = _OLD_NAMES[parts[-2]]
    return ".".join(parts)


def _own_notes(
    directory: Path, config: UNetConfig, schedule: ScheduleConfig, objective: ObjectiveConfig
) -> ExchangeNotes:
    """`ddpm.json`, if it agrees with the diffusers files beside it."""
    path = directory / _OWN
    try:
        notes = ExchangeNotes.model_validate(_read(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {place}: {first['msg']}; remove the file or export again") from None
    same = net_to_diffusers(notes.net) == net_to_diffusers(config) and scheduler_to_diffusers(
        notes.schedule, notes.objective
    ) == scheduler_to_diffusers(schedule, objective)
    if not same:
        raise UserError(f"{path}: contradicts the diffusers files beside it; remove it to use theirs")
    return notes


def _load(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        pickled = path.with_suffix(".bin").exists()
        remedy = (
            "only a pickled .bin is there, which is never loaded; save it again with safe_serialization=True"
            if pickled
            else "download it, unsharded"
        )
        raise UserError(f"{path}: missing; {remedy}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamageError(f"{path}: not a whole safetensors file ({error})") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        document = from_json(path.read_bytes())  # unlike the json module, it rejects unbounded nesting
    except FileNotFoundError:
        raise UserError(f"{path}: missing; name a directory written by diffusers") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: not a JSON object")
    return document  # pyright: ignore[reportUnknownVariableType] - keys of a JSON object are strings


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")
