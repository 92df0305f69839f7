"""Finds the network of a generation: a folder, or a version in the registry that the driver pins once."""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.spec import Spec, make_model_identity, make_spec
from ddpm_pipeline.nets.model_files import CARD_FILE, read_model


@dataclass(frozen=True)
class ResolvedModel:
    """A pinned network: its card, the bytes of its weights, and its origin."""

    card: ModelCard
    weights: bytes
    name: str
    """Registered name; `local` for a folder."""
    version: int | None
    run_id: str | None
    """MLflow run of the training, if known."""
    card_sha256: str
    """Hex digest of the bytes of the card's file."""


def resolve_model(config: GenerateConfig) -> tuple[ResolvedModel, Spec]:
    """The network that a generation's settings name, and the spec that follows. UserError if they do not match."""
    model = find_model(config.model)
    device = "cuda" if config.gpus_per_worker else "cpu"
    spec = make_spec(
        config,
        model.card,
        name=model.name,
        version=model.version,
        device=device,
        card_sha256=model.card_sha256,
    )
    return model, spec


def find_model(reference: str) -> ResolvedModel:
    """Resolve `name@alias`, `name/version` or a folder. UserError if there is none; DamageError if it is damaged."""
    folder = Path(reference)
    if (folder / CARD_FILE).exists():
        return _read(folder, "local", None, None)
    if folder.is_dir():
        raise UserError(f"model: {reference} is a folder without {CARD_FILE}; name one that holds a model")
    if reference.startswith((".", "/", "~")) or not ("@" in reference or "/" in reference):
        raise UserError(
            f"model: {reference} is not a folder with {CARD_FILE}; use name@alias, name/version or such a folder"
        )
    return _from_registry(reference)


def find_model_of(spec: Spec, reference: str | None = None) -> ResolvedModel:
    """The network that made a generation; `reference` names it where the spec does not. UserError for another one."""
    chosen = reference or spec.model.reference
    if chosen is None:
        raise UserError("model: the generation's network came from a folder; name it with --model")
    found = find_model(chosen)
    known = found.card_sha256 if spec.model.card is not None else None
    if make_model_identity(found.card, spec.model.name, spec.model.version, known) != spec.model:
        raise UserError(
            f"model: {reference or spec.model.name} is not the network of this generation; name the one that is"
        )
    return found


def registered_name(reference: str) -> str | None:
    """The name of the registered model in a reference as for `find_model`; None for a folder."""
    if (Path(reference) / CARD_FILE).exists() or reference.startswith((".", "/", "~")):
        return None
    return reference.removeprefix("models:/").partition("@")[0].partition("/")[0]


def _from_registry(reference: str) -> ResolvedModel:
    from ddpm_pipeline.tracking.registry import download, resolve  # MLflow takes seconds to import

    version = resolve(reference)
    with tempfile.TemporaryDirectory(prefix="ddpm-model-") as scratch:
        folder = download(version, Path(scratch))
        return _read(folder, version.name, version.version, version.run_id)


def _read(folder: Path, name: str, version: int | None, run_id: str | None) -> ResolvedModel:
    card, weights = read_model(folder)
    card_sha256 = hashlib.sha256((folder / CARD_FILE).read_bytes()).hexdigest()
    return ResolvedModel(card, weights, name, version, run_id or card.training.run_id, card_sha256)
