"""The evaluation document: metrics, the conditions under which two may be compared, and where it is stored."""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.bounds import Name, Sha256
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.store import ObjectMissing, open_store


class Metric(Settings):
    """One number with the images behind it."""

    value: float
    """The number itself."""
    n: int = Field(ge=0, lt=2**53)
    """Samples it was computed from."""
    n_reference: int = Field(ge=0, lt=2**53)
    """Reference images it was computed from; 0 where none were."""


class EvaluationConditions(Settings):
    """What metrics depend on besides the quality of the samples."""

    gpu: Name | None = Field(default=None, exclude_if=lambda gpu: gpu is None)
    """Model of the GPU that computed features and likelihoods; left out if CPUs did."""
    count: int = Field(ge=0, lt=2**53)
    """Samples."""
    reference_digest: str = Field(max_length=128)
    """Digest of the reference data set."""
    reference_count: int = Field(ge=0, lt=2**53)
    """Its images."""
    network: str = Field(max_length=128)
    """Identity of the feature network."""
    settings: str = Field(max_length=128)
    """Digest of the settings that change metrics."""


class Evaluation(Settings):
    """The metrics of one set of samples."""

    format: Literal[1] = 1
    """Version of this document's layout."""
    subject: str = Field(max_length=2048)
    """What was evaluated, such as a generation's prefix."""
    model: str | None = Field(max_length=512)
    """`name/version` of the model that made the samples; None when it is not known."""
    model_sha256: str | None = Field(max_length=128)
    """Of its weights."""
    spec_digest: str | None = Field(max_length=128)
    """Of the generation; None when the samples are no generation's."""
    sampler: str | None = Field(max_length=512)
    """Kind, steps and guidance, for people."""
    reference: str = Field(max_length=4096)
    """URI of the reference data set."""
    network_label: str = Field(max_length=512)
    """The feature network, for people."""
    terms: EvaluationConditions
    """What must be equal in evaluations that are compared."""
    metrics: dict[Annotated[str, Field(max_length=128)], Metric] = Field(max_length=128)
    """By name."""
    neighbours_sha256: Sha256 | None = Field(default=None, exclude_if=lambda digest: digest is None)
    """Of the picture of samples beside their nearest reference images; left out where none was drawn."""
    made_at: float = Field(ge=0, lt=1e11)
    """Seconds since 1970 (UTC)."""

    def __getitem__(self, name: str) -> float:
        """The value of a metric. KeyError names it."""
        return self.metrics[name].value


def require_comparable(a: Evaluation, b: Evaluation) -> None:
    """UserError, naming the condition, unless the two evaluations were made under equal conditions."""
    for name in EvaluationConditions.model_fields:
        one, other = getattr(a.terms, name), getattr(b.terms, name)
        if one != other:
            remedy = (
                "on the same kind of device (gpus_per_task)" if name == "gpu" else "with the same settings"
            )
            raise UserError(
                f"{a.subject} and {b.subject} cannot be compared: {name} is {one} and {other}; evaluate both {remedy}"
            )


def evaluation_location(output: str) -> tuple[str, str]:
    """Store URI and key of the evaluation of a generation: beside its prefix."""
    parent, _, name = output.rstrip("/").rpartition("/")
    return parent, f"{name}.evaluation.json"


def evaluation_uri(output: str) -> str:
    """URI of the evaluation of a generation."""
    return "/".join(evaluation_location(output))


def neighbours_location(output: str) -> tuple[str, str]:
    """Store URI and key of the picture of an evaluation: beside its document."""
    parent, _, name = output.rstrip("/").rpartition("/")
    return parent, f"{name}.neighbours.png"


def neighbours_uri(output: str) -> str:
    """URI of the picture of an evaluation."""
    return "/".join(neighbours_location(output))


def save_neighbours(output: str, picture: bytes) -> str:
    """Write the picture of an evaluation, before the document that names it. Returns the sha256."""
    parent, key = neighbours_location(output)
    open_store(parent).write(key, picture)
    return hashlib.sha256(picture).hexdigest()


def load_neighbours(evaluation: Evaluation) -> bytes | None:
    """The picture of an evaluation; None where none was drawn. DamageError unless it is the one the document names."""
    if evaluation.neighbours_sha256 is None:
        return None
    parent, key = neighbours_location(evaluation.subject)
    try:
        picture = open_store(parent).read(key)
    except ObjectMissing:
        picture = b""
    if hashlib.sha256(picture).hexdigest() != evaluation.neighbours_sha256:
        raise DamageError(
            f"{parent}/{key}: missing, or of another evaluation; run: ddpm evaluate --prefix {evaluation.subject}"
        )
    return picture


def save_evaluation(evaluation: Evaluation) -> None:
    """Write an evaluation beside the generation that is its subject."""
    parent, key = evaluation_location(evaluation.subject)
    document = json.dumps(evaluation.model_dump(mode="json"), indent=2) + "\n"
    open_store(parent).write(key, document.encode())


def load_evaluation(output: str) -> Evaluation | None:
    """The stored evaluation of a generation, or None. DamageError for one that cannot be read."""
    parent, key = evaluation_location(output)
    try:
        return read_evaluation(open_store(parent).read(key), evaluation_uri(output))
    except ObjectMissing:
        return None


def read_evaluation(data: bytes, where: str) -> Evaluation:
    """An evaluation from its JSON. DamageError naming `where`."""
    return parse_document(Evaluation, data, where, "an evaluation")


_READ_AS = {
    "bits_per_dim": "lower is better",
    "class_accuracy": "higher is better",
    "exact_copies": "0 is best",
    "duplicates": "0 is best",
    "frechet": "lower is better",
    "frechet_between_halves": "what the data reaches against itself",
    "frechet_ratio": "1 is as good as real data",
    "frechet_ratio_logits": "the same on the classifier's logits",
    "frechet_to_half": "lower is better",
    "inception_score": "higher is better",
    "kernel": "0 is as good as real data",
    "near_copies": "no more than near_copies_real",
    "near_copies_features": "no more than near_copies_features_real",
    "near_copies_features_real": "what held-out real images have",
    "near_copies_real": "what held-out real images have",
    "nearest_ratio": "1 is as far from the data as real images are",
    "precision": "share of samples that look real",
    "recall": "share of the data that is covered",
}


def table(evaluation: Evaluation, other: Evaluation | None = None) -> list[str]:
    """A line for each metric, with the numbers of images behind it, and the value of another evaluation beside it."""
    lines = [
        f"subject    {evaluation.subject}" + (f"  (model {evaluation.model})" if evaluation.model else ""),
        f"reference  {evaluation.reference}, {evaluation.terms.reference_count:,} images, "
        f"digest {evaluation.terms.reference_digest[:12]}",
        f"network    {evaluation.network_label}",
    ]
    if other is not None:
        lines.append(f"against    {other.subject}" + (f"  (model {other.model})" if other.model else ""))
    beside = "" if other is None else f"{'against':>12}"
    lines.append(f"{'metric':<24}{'value':>12}{beside}{'N':>9}{'N ref':>9}")
    for name, metric in evaluation.metrics.items():
        values = f"{metric.value:>12.5g}"
        if other is not None:
            values += f"{other[name]:>12.5g}" if name in other.metrics else f"{'-':>12}"
        line = f"{name:<24}{values}{metric.n:>9,}{metric.n_reference:>9,}   {_READ_AS.get(name, '')}"
        lines.append(line.rstrip())
    return lines
