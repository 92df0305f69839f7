"""A trained network as two files: `model.safetensors` (weights) and `model.json` (how to use them).

The card carries the sha256 of the weights: a directory is either whole or refused. Nothing is pickled.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline.config.base import Settings
from pipeline.config.bounds import MAX_CLASSES, Key, Name
from pipeline.config.diffusion import ObjectiveConfig, ScheduleConfig
from pipeline.config.json_document import first_fault
from pipeline.config.net import UNetConfig
from pipeline.errors import DamageError, UserError
from pipeline.nets.unet import UNet

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "model.json"
MOST_CARD_BYTES = 1 << 26
MOST_TIMES_STORED = 4
"""How much larger than its file a network may be: weights may be stored in 8 bits and are computed with in 32."""
_Levels = Annotated[tuple[float, ...], Field(max_length=4096)]


class ImageShape(Settings):
    """The images a network makes."""

    channels: int = Field(ge=1, le=4096)
    """Colour channels: 1 (grey) or 3 (RGB)."""

    size: int = Field(ge=1, le=8192)
    """Height and width, pixels."""


class TrainingData(Settings):
    """What is worth knowing, when generating, about the data a network was trained on."""

    digest: Name | None = None
    """Digest of the index of the shards; None when it is not known (an imported network)."""

    channel_mean: _Levels | None = None
    """Mean of each channel over the training set, in uint8 levels (0..255); None when it was not measured."""

    channel_std: _Levels | None = None
    """Standard deviation of each channel over the training set, in uint8 levels; None: not measured."""


class WeightsInfo(Settings):
    """Which weights of a training these are."""

    kind: Name = "ema"
    """The kind of weights: `ema` (an exponential moving average), `raw`, or a name that training gives."""

    sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    """Hex digest of the bytes of `model.safetensors`; `save_model` fills it in."""


class TrainingInfo(Settings):
    """Where a network comes from."""

    step: int | None = Field(default=None, ge=0, lt=2**63)
    """Optimiser steps taken; None when it is not known."""

    run_id: Name | None = None
    """The MLflow run of the training; None when there was none."""

    init_from: Key | None = None
    """The model that was fine-tuned (`name/3`, or a directory); None for a training from the start."""

    init_sha256: Name | None = None
    """Hex digest of that model's weights."""


class ModelCard(Settings):
    """`model.json`: the network's shape, the process it was trained for, and its origin."""

    format: Literal[1] = 1
    """Version of this file's layout."""

    net: UNetConfig
    """The network's architecture."""

    schedule: ScheduleConfig
    """The noise schedule it was trained with."""

    objective: ObjectiveConfig
    """What its output means."""

    image: ImageShape
    """The images it makes."""

    class_names: Annotated[tuple[Name, ...], Field(max_length=MAX_CLASSES)] | None = None
    """Names of the classes by label; None for a network without classes, or with nameless ones."""

    data: TrainingData = TrainingData()
    """The training data's identity and statistics."""

    weights: WeightsInfo = WeightsInfo()
    """Which weights lie beside this file, and their hash."""

    training: TrainingInfo = TrainingInfo()
    """The training they come from."""

    @field_validator("class_names")
    @classmethod
    def _no_more_names_than_classes(
        cls, names: tuple[str, ...] | None, info: ValidationInfo
    ) -> tuple[str, ...] | None:
        net: UNetConfig | None = info.data.get("net")  # none where it is wrong itself
        classes = None if net is None else net.num_classes
        if names is not None and classes is not None and len(names) > classes:
            raise ValueError(f"{len(names)} names for a network of {classes} classes")
        return names


def save_model(directory: Path, net_state: Mapping[str, Tensor], card: ModelCard) -> ModelCard:
    """Write weights and card into `directory` (made if need be); return the card with the weights' sha256.

    The weights go first and the card last, each written whole under a temporary name before it is renamed.
    Equal tensors give equal bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().to("cpu").contiguous().clone() for name, value in net_state.items()}
    data = save_tensors(tensors, metadata={"format": "pt"})
    sha256 = hashlib.sha256(data).hexdigest()
    card = card.model_copy(update={"weights": card.weights.model_copy(update={"sha256": sha256})})
    _replace(directory / WEIGHTS_FILE, data)
    _replace(directory / CARD_FILE, (json.dumps(card.model_dump(mode="json"), indent=2) + "\n").encode())
    return card


def load_card(directory: Path) -> ModelCard:
    """Read `model.json` alone. UserError when it is missing or not a card."""
    path = directory / CARD_FILE
    try:
        if path.stat().st_size > MOST_CARD_BYTES:
            raise UserError(f"{path}: longer than {MOST_CARD_BYTES} bytes, which no model card is")
        return ModelCard.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory}: no {CARD_FILE} here; name a directory that holds a model") from None
    except ValidationError as error:
        raise UserError(f"{path}: not a model card ({first_fault(error)}); export the model again") from None


def load_model(directory: Path, device: str | torch.device = "cpu") -> tuple[UNet, ModelCard]:
    """The network with its weights, in eval mode on `device`, and its card.

    UserError when a file is missing; DamageError when the weights are not those of the card or do not fit it.
    """
    card, data = read_model(directory)
    return _built(card, data, device, where=str(directory / WEIGHTS_FILE)), card


def read_model(directory: Path) -> tuple[ModelCard, bytes]:
    """A model's card and the bytes of its weights, which are those of the card.

    UserError when a file is missing; DamageError when the weights are others.
    """
    card = load_card(directory)
    path = directory / WEIGHTS_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: missing; export the model again, or download both files") from None
    _check(card, data, where=str(path))
    return card, data


def build_model(card: ModelCard, data: bytes, device: str | torch.device = "cpu", *, where: str) -> UNet:
    """The network of a card with the weights `data` (the bytes of a weights file that came from `where`)."""
    _check(card, data, where)
    return _built(card, data, device, where)


def _check(card: ModelCard, data: bytes, where: str) -> None:
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != card.weights.sha256:
        expected = card.weights.sha256 or "nothing"
        raise DamageError(f"{where}: its sha256 is {sha256}, but {CARD_FILE} says {expected}")


def _built(card: ModelCard, data: bytes, device: str | torch.device, where: str) -> UNet:
    _require_room(card, len(data), where)
    # The initial weights are thrown away: leave no trace of having drawn them.
    with torch.random.fork_rng(devices=[]):
        net = UNet(card.net)
    try:
        net.load_state_dict(load_tensors(data))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DamageError(f"{where}: the weights do not fit the network in {CARD_FILE}: {reason}") from None
    return net.to(device).eval().requires_grad_(False)


def _require_room(card: ModelCard, size_bytes: int, where: str) -> None:
    """Raise DamageError before memory is taken for a network that these weights cannot fill."""
    with torch.device("meta"):
        values = [*UNet(card.net).state_dict().values()]
    wanted = sum(value.numel() * value.element_size() for value in values)
    if wanted > MOST_TIMES_STORED * size_bytes:
        raise DamageError(
            f"{where}: {size_bytes} bytes of weights do not fit the network in {CARD_FILE}, which has {wanted}"
        )


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
