"""A trained network as two files: `model.safetensors` (weights) and `model.json` (how to use them).

The card contains the sha256 of the weights: an incomplete directory is rejected. Nothing is pickled.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ddpm_pipeline.config.json_document import first_fault
from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.nets.build import build_net

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "model.json"
MAX_CARD_BYTES = 1 << 26
MAX_EXPANSION = 4
"""Maximum size of a network relative to its file: weights may be stored in 8 bits and are computed with in 32."""


def save_model(directory: Path, net_state: Mapping[str, Tensor], card: ModelCard) -> ModelCard:
    """Write weights and card into `directory` (created if missing); return the card with the weights' sha256.

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
        if path.stat().st_size > MAX_CARD_BYTES:
            raise UserError(f"{path}: longer than {MAX_CARD_BYTES} bytes; not a model card")
        return ModelCard.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory}: no {CARD_FILE} here; name a directory that holds a model") from None
    except ValidationError as error:
        raise UserError(f"{path}: not a model card ({first_fault(error)}); export the model again") from None


def load_model(directory: Path, device: str | torch.device = "cpu") -> tuple[nn.Module, ModelCard]:
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


def build_model(card: ModelCard, data: bytes, device: str | torch.device = "cpu", *, where: str) -> nn.Module:
    """The network of a card with the weights `data` (the bytes of a weights file that came from `where`)."""
    _check(card, data, where)
    return _built(card, data, device, where)


def _check(card: ModelCard, data: bytes, where: str) -> None:
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != card.weights.sha256:
        expected = card.weights.sha256 or "nothing"
        raise DamageError(f"{where}: its sha256 is {sha256}, but {CARD_FILE} says {expected}")


def _built(card: ModelCard, data: bytes, device: str | torch.device, where: str) -> nn.Module:
    _require_room(card, len(data), where)
    # The initial weights are discarded: restore the generator's state.
    with torch.random.fork_rng(devices=[]):
        net = build_net(card.net)
    try:
        net.load_state_dict(load_tensors(data))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DamageError(f"{where}: the weights do not fit the network in {CARD_FILE}: {reason}") from None
    return net.to(device).eval().requires_grad_(False)


def _require_room(card: ModelCard, size_bytes: int, where: str) -> None:
    """Raise DamageError before allocating a network that these weights cannot fill."""
    with torch.device("meta"):
        values = [*build_net(card.net).state_dict().values()]
    wanted = sum(value.numel() * value.element_size() for value in values)
    if wanted > MAX_EXPANSION * size_bytes:
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
