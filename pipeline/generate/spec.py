"""The spec: everything that determines a generation's bytes, and the digest that identifies it."""

import hashlib
import json
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ddpm_pipeline.config.base import Settings, refuse_idle
from ddpm_pipeline.config.bounds import (
    MAX_CLASSES,
    MAX_IMAGES,
    MAX_IMAGES_A_SHARD,
    Count,
    Label,
    Name,
    Number,
    Sha256,
)
from ddpm_pipeline.config.device_kind import DeviceKind, Matmul
from ddpm_pipeline.config.diffusion import SamplerConfig, check_together
from ddpm_pipeline.config.generation import ClassChoice, SpecSettings, check_plan
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.config.model_card import ModelCard, TrainingData
from ddpm_pipeline.data.formats.provenance import synthetic_mark
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.layout import SPEC_KEY
from ddpm_pipeline.store import ObjectMissing, Store


class ModelIdentity(Settings):
    """The pinned network of a generation."""

    name: Name
    """Registered name; `local` for a folder."""
    version: Number | None
    """Registered version; None for a folder."""
    sha256: Sha256
    """Hex digest of the weights file."""
    weights: Name
    """Kind of weights, such as `ema`."""
    process: Sha256
    """Digest of the card's network, schedule, objective and image shape: how the weights are used."""
    card: Sha256 | None = None
    """Hex digest of the card's file, class names and training data's statistics included; None in specs of versions
    that did not record it. Not part of the digest, but compared if both specs have it."""

    @property
    def reference(self) -> str | None:
        """`name/version`, as the registry resolves it; None for a folder."""
        return None if self.version is None else f"{self.name}/{self.version}"


class ClassPlan(Settings):
    """The class of each sample; see `ddpm_pipeline.generate.class_labels`."""

    labels: tuple[Label, ...] = Field(min_length=1, max_length=MAX_CLASSES)
    """The labels used, in order."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None
    """Relative frequency of each label, drawn by (seed, index); None = the labels in turn."""

    @model_validator(mode="after")
    def _one_weight_per_label(self) -> Self:
        if self.weights is not None and (len(self.weights) != len(self.labels) or sum(self.weights) <= 0):
            raise ValueError("weights must be one for each of labels, and not all zero")
        return self


class Spec(Settings):
    """What determines a generation's bytes. If digests are equal, samples of equal index have equal bytes."""

    format: Literal[1] = 1
    """Version of the layout of a generation."""
    model: ModelIdentity
    """The network."""
    channels: int = Field(ge=1, le=4096)
    """Channels of an image."""
    size: int = Field(ge=1, le=8192)
    """Height and width of an image, pixels."""
    sampler: SamplerConfig
    """The reverse process."""
    classes: ClassPlan | None
    """Classes of the samples; None = sampling without classes."""
    seed: int = Field(ge=0, lt=2**63)
    """Seed of the noise."""
    first_index: Count
    """Index of the first sample."""
    count: int = Field(ge=1, le=MAX_IMAGES)
    """Samples requested so far. Not part of the digest, because it may be raised."""
    image_format: Literal["png", "webp", "npy"]
    """Encoding of a sample."""
    provenance: Literal["xmp"] | None = Field(default=None, exclude_if=lambda form: form is None)
    """How images are marked as synthetic: `xmp` in PNG and WebP. None in specs of versions that had no marks: their
    documents and digests stay as they were."""
    shard_size: int = Field(ge=1, le=MAX_IMAGES_A_SHARD)
    """Samples in a full shard."""
    batch_size: int = Field(ge=1, le=MAX_IMAGES_A_SHARD)
    """Samples per network call."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Precision of the network's arithmetic."""
    device: Literal["cpu", "cuda"]
    """Kind of device: rounding differs between kinds."""
    cpu_threads: Annotated[int, Field(ge=1, le=4096)] | None
    """Threads of a worker on the CPU; None on a GPU, where they have no effect."""
    compile: bool
    """Whether the network is compiled."""
    matmul: Matmul = "ieee"
    """Arithmetic of float32 products on a GPU. In documents and in the digest for GPUs only."""
    device_kind: DeviceKind | None = None
    """The kind of GPU: two kinds round differently. None until a job has fixed it, and on the CPU. In documents and in
    the digest for GPUs only."""

    @model_validator(mode="after")
    def _can_be_planned(self) -> Self:
        check_plan(self.first_index, self.count, self.shard_size, self.batch_size)
        if self.device == "cpu":
            refuse_idle(self, ("matmul", "device_kind"), "on a CPU")
        return self

    @model_serializer(mode="wrap")
    def _documented(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Specs of the CPU keep the documents and the digests that they had before GPUs were told apart."""
        document: dict[str, Any] = handler(self)
        if self.device == "cpu":
            for name in ("matmul", "device_kind"):
                document.pop(name, None)
        return document

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return (self.size, self.size, self.channels)

    def mark(self, index: int | None = None) -> bytes | None:
        """The mark of sample `index`, or of an image of several samples; None if images have none."""
        return None if self.provenance is None else synthetic_mark(self.digest, index)

    @property
    def digest(self) -> str:
        """Hex sha256 of the canonical JSON of all fields but `count` and `model.card`."""
        return hashlib.sha256(canonical(_identity(self))).hexdigest()


def _identity(spec: Spec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude={"count": True, "model": {"card": True}})


def canonical(document: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal content, equal bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def pretty(document: Any) -> bytes:
    """Indented JSON: equal content, equal bytes."""
    return (json.dumps(document, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def make_spec(
    settings: SpecSettings,
    card: ModelCard,
    *,
    name: str = "local",
    version: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    device_kind: DeviceKind | None = None,
    card_sha256: str | None = None,
) -> Spec:
    """The spec of `settings` for the model with this card. UserError if they do not match."""
    if device == "cpu" and settings.matmul != "ieee":
        raise UserError("matmul: has no effect on a CPU; leave it out, or use a GPU")
    if settings.weights is not None and settings.weights != card.weights.kind:
        raise UserError(
            f"weights: {settings.model} holds {card.weights.kind!r} weights, not {settings.weights!r}; "
            "name a model that was exported with them"
        )
    distilled = card.distillation is not None
    check_together(card.schedule, card.objective, settings.sampler, distilled=distilled)
    _check_guidance(settings, card)
    return Spec(
        model=make_model_identity(card, name, version, card_sha256),
        channels=card.image.channels,
        size=card.image.size,
        sampler=settings.sampler,
        classes=resolve_classes(settings.classes, card),
        seed=settings.seed,
        first_index=settings.first_index,
        count=settings.count,
        image_format=settings.image_format,
        provenance=None if settings.provenance is False else "xmp",
        shard_size=settings.shard_size,
        batch_size=settings.batch_size,
        dtype=settings.dtype,
        device=device,
        cpu_threads=settings.cpu_threads if device == "cpu" else None,
        compile=settings.compile,
        matmul=settings.matmul,
        device_kind=device_kind,
    )


def make_model_identity(
    card: ModelCard, name: str, version: int | None, card_sha256: str | None = None
) -> ModelIdentity:
    """The identity of the network with this card under a registered name, or `local`."""
    process = card.model_dump(mode="json", include={"net", "schedule", "objective", "image"})
    return ModelIdentity(
        name=name,
        version=version,
        sha256=card.weights.sha256,
        weights=card.weights.kind,
        process=hashlib.sha256(canonical(process)).hexdigest(),
        card=card_sha256,
    )


def _check_guidance(settings: SpecSettings, card: ModelCard) -> None:
    if settings.sampler.guidance_scale == 1.0:
        return
    if card.net.null_label is None:
        raise UserError(
            "sampler.guidance_scale: the network has no 'no class' label to guide away from; use 1.0, "
            "or train with net.null_class"
        )
    if settings.classes is None:
        raise UserError("sampler.guidance_scale: there is no class to guide towards; use 1.0, or set classes")


def resolve_classes(choice: ClassChoice, card: ModelCard) -> ClassPlan | None:
    """Labels for a choice that may hold names. UserError names the unknown class and lists the known ones."""
    known = card.net.num_classes
    if known is None and choice in (None, "auto"):
        return None
    if choice is None and card.distillation is not None:
        raise UserError('classes: the network was distilled with classes only; use "balanced"')
    if choice is None and card.net.null_label is None:
        raise UserError('classes: the network was not trained without classes; use "balanced"')
    if choice is None:
        return None
    if known is None:
        raise UserError("classes: the network has no classes; leave the setting out")
    if choice == "data":
        plan = classes_of_training(card.data)
        if plan is None:
            raise UserError(
                "classes: the model's card does not count the training images of each class; "
                'give weights, such as {cat: 2, dog: 1}, or use "balanced"'
            )
        return plan
    if isinstance(choice, str):
        return ClassPlan(labels=tuple(range(known)), weights=None)
    if not choice:
        raise UserError("classes: empty; name at least one class, or leave the setting out")
    if isinstance(choice, list):
        return ClassPlan(labels=tuple(_label(c, known, card.class_names) for c in choice), weights=None)
    pairs = sorted((_label(c, known, card.class_names), float(w)) for c, w in choice.items())
    labels = tuple(label for label, _ in pairs)
    weights = tuple(weight for _, weight in pairs)
    if len(set(labels)) < len(labels):
        raise UserError("classes: a class is named twice; give each one weight")
    if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise UserError("classes: weights must be finite, not negative, and not all zero; correct them")
    return ClassPlan(labels=labels, weights=weights)


def classes_of_training(data: TrainingData) -> ClassPlan | None:
    """Each class as often as it occurs in the training data; None if that is not known."""
    found = [(label, float(count)) for label, count in enumerate(data.class_counts or ()) if count]
    if not found:
        return None
    labels, weights = zip(*found, strict=True)
    return ClassPlan(labels=labels, weights=weights)


def _label(choice: int | str, known: int, names: tuple[str, ...] | None) -> int:
    if isinstance(choice, str) and names is not None and choice in names:
        return names.index(choice)
    if isinstance(choice, int) and 0 <= choice < known:
        return choice
    listed = ", ".join(names[:20]) if names else "none has a name"
    raise UserError(f"classes: {choice!r} is unknown; labels are 0..{known - 1}, names: {listed}")


def read_spec(store: Store) -> Spec | None:
    """The spec that owns a prefix, or None. DamageError if the object is not a spec."""
    try:
        data = store.read(SPEC_KEY)
    except ObjectMissing:
        return None
    return parse_document(Spec, data, f"{store.uri}/{SPEC_KEY}", "a spec")


def write_spec(store: Store, spec: Spec, *, replaces: str | None = None) -> None:
    """Make `spec` the one that owns a prefix; `replaces` as in `Store.write`."""
    store.write(SPEC_KEY, pretty(spec.model_dump(mode="json")), replaces=replaces)


def require_extension(uri: str, existing: Spec, spec: Spec) -> None:
    """UserError unless `spec` equals the `existing` one at the prefix `uri`, or only raises its count."""
    differing = differences(existing, spec)
    if differing:
        raise UserError(
            f"{uri}: already holds another generation ({'; '.join(differing)}); "
            "choose another output prefix, or the same settings"
        )
    if spec.count < existing.count:
        raise UserError(
            f"{uri}: count is {existing.count} at this prefix and can only be raised, not lowered to {spec.count}; "
            "choose another output prefix, or raise count"
        )


def differences(existing: Spec, requested: Spec) -> list[str]:
    """The fields, dotted, in which two specs differ apart from `count`: `seed: 0 stored, 1 requested`.

    The card's hash is compared if both specs have it.
    """
    old, new = _flat(_identity(existing)), _flat(_identity(requested))
    if existing.model.card is not None and requested.model.card is not None:
        old["model.card"], new["model.card"] = existing.model.card, requested.model.card
    return [
        f"{field}: {json.dumps(old.get(field))} stored, {json.dumps(new.get(field))} requested"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(cast(dict[str, Any], value), f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
