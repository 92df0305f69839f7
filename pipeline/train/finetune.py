"""Fine-tuning: the initial weights of a training, checked, hashed and copied beside its checkpoints.

    initial/model.safetensors, initial/model.json     the model as it is exported for the registry

The driver reads them once, from the registry or a directory; workers and restarts read the copy, so that neither
needs the registry, or a directory that only one machine has.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.diffusion import ObjectiveConfig
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.config.model_card import ImageShape, ModelCard, WeightsInfo
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.nets.diffusers_weights import import_diffusers
from ddpm_pipeline.nets.model_files import CARD_FILE, WEIGHTS_FILE, build_model, read_model, save_model
from ddpm_pipeline.store import Store, retry_during_outage
from ddpm_pipeline.tracking import ModelVersion, download, resolve

FOLDER = "initial/"
# Settings that may differ: they change how the weights are trained, not what they compute.
_FREE = {
    "net": {"dropout"},
    "schedule": set[str](),
    "objective": {"weighting", "min_snr_gamma", "vlb_weight", "variance"},
}


@dataclass(frozen=True)
class InitialWeights:
    """A model to start from."""

    name: str
    """For display: `digits/3`, or a directory."""
    card: ModelCard
    weights: bytes
    """Of `model.safetensors`."""
    version: ModelVersion | None = None
    """The registered version, if it is one."""

    @property
    def sha256(self) -> str:
        """Of the weights: part of the identity of a training that starts from them."""
        return self.card.weights.sha256


def find_initial(config: TrainConfig) -> InitialWeights | None:
    """The model that `init_from` names, read and checked; None if it is not set.

    Raises UserError for a model that does not exist or does not fit the settings, DamageError for damaged weights.
    """
    if config.init_from is None:
        return None
    folder = Path(config.init_from).expanduser()
    with tempfile.TemporaryDirectory(prefix="ddpm-initial-") as scratch:
        if folder.is_dir():
            initial = _of_directory(folder, Path(scratch))
        else:
            initial = _of_registry(config.init_from, Path(scratch))
    require_same(config, initial)
    return initial


def stage_initial(store: Store, initial: InitialWeights) -> None:
    """Copy the model beside the checkpoints, weights first; an existing copy stays."""
    if store.stat(FOLDER + CARD_FILE) is not None:
        return
    store.write(FOLDER + WEIGHTS_FILE, initial.weights)
    store.write(FOLDER + CARD_FILE, initial.card.model_dump_json(indent=2).encode())


def staged_model(store: Store, sha256: str) -> tuple[ModelCard, nn.Module]:
    """The staged model on the CPU. Raises DamageError when its weights are not those of the identity."""
    data = retry_during_outage(lambda: store.read(FOLDER + CARD_FILE))
    card = parse_document(ModelCard, data, f"{store.uri}/{FOLDER}{CARD_FILE}", "a model card")
    weights = retry_during_outage(lambda: store.read(FOLDER + WEIGHTS_FILE))
    where = f"{store.uri}/{FOLDER}{WEIGHTS_FILE}"
    if card.weights.sha256 != sha256:
        raise DamageError(f"{where}: is of another model; delete {FOLDER} there and start the job again")
    return card, build_model(card, weights, where=where)


def _of_registry(reference: str, scratch: Path) -> InitialWeights:
    try:
        version = resolve(reference)
    except UserError as error:
        raise UserError(f"train.init_from: no directory of that name, and {error}") from None
    card, weights = read_model(download(version, scratch))
    return InitialWeights(version.reference, card, weights, version)


def _of_directory(folder: Path, scratch: Path) -> InitialWeights:
    if not (folder / CARD_FILE).exists():
        found = import_diffusers(folder)
        card = ModelCard(
            net=found.net.config,
            schedule=found.schedule,
            objective=found.objective,
            image=ImageShape(channels=found.net.config.in_channels, size=found.net.config.image_size),
            weights=WeightsInfo(kind="imported"),
        )
        save_model(scratch, found.net.state_dict(), card)
        folder, origin = scratch, folder
    else:
        origin = folder
    card, weights = read_model(folder)
    return InitialWeights(str(origin), card, weights)


def require_same(config: TrainConfig, initial: InitialWeights) -> None:
    """UserError unless network, schedule and target are those that the weights were trained with.

    A student may have another target than its teacher.
    """
    free = _FREE if config.distillation is None else _FREE | {"objective": set(ObjectiveConfig.model_fields)}
    differing = [
        f"{section}.{field} {theirs!r}, here {ours!r}"
        for section, own, other in [
            ("net", config.net, initial.card.net),
            ("schedule", config.schedule, initial.card.schedule),
            ("objective", config.objective, initial.card.objective),
        ]
        for field, ours, theirs in _differences(own, other)
        if field not in free[section]
    ]
    if differing:
        raise UserError(
            f"train.init_from: {initial.name} has {'; '.join(differing)}; use the same here, or start from "
            "another model"
        )


def _differences(own: Settings, other: Settings) -> list[tuple[str, object, object]]:
    """(field, ours, theirs) wherever two groups of the same settings differ."""
    ours, theirs = own.model_dump(), other.model_dump()
    fields = [*ours, *(field for field in theirs if field not in ours)]
    return [
        (field, ours.get(field), theirs.get(field))
        for field in fields
        if ours.get(field) != theirs.get(field)
    ]
