"""An evaluation: figures, and everything that must be equal before two of them may be compared."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.base import Settings
from pipeline.config.json_document import parse_document
from pipeline.errors import UserError
from pipeline.evaluate.metrics import Metric


class EvaluationConditions(Settings):
    """What figures depend on besides the samples' quality."""

    count: int = Field(ge=0, lt=2**53)
    """Samples."""
    reference_digest: str = Field(max_length=128)
    """Digest of the reference data set."""
    reference_count: int = Field(ge=0, lt=2**53)
    """Its images."""
    network: str = Field(max_length=128)
    """Identity of the feature network."""
    settings: str = Field(max_length=128)
    """Digest of the settings that change figures."""


class Evaluation(Settings):
    """The figures of one set of samples."""

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
    """Figures by name."""
    made_at: float = Field(ge=0, lt=1e11)
    """Seconds since 1970 (UTC)."""

    def __getitem__(self, name: str) -> float:
        """The value of a figure. KeyError names it."""
        return self.metrics[name].value


def require_comparable(a: Evaluation, b: Evaluation) -> None:
    """UserError, naming the term, unless the two evaluations were made on equal terms."""
    for name in EvaluationConditions.model_fields:
        one, other = getattr(a.terms, name), getattr(b.terms, name)
        if one != other:
            raise UserError(
                f"{a.subject} and {b.subject} cannot be compared: {name} is {one} and {other}; "
                "evaluate both on equal terms"
            )


def read_evaluation(data: bytes, where: str) -> Evaluation:
    """An evaluation from its JSON. DamageError naming `where`."""
    return parse_document(Evaluation, data, where, "an evaluation")


_GOOD = {
    "bits_per_dim": "lower is better",
    "class_accuracy": "higher is better",
    "exact_copies": "0 is right",
    "duplicates": "0 is right",
    "frechet": "lower is better",
    "frechet_between_halves": "what the data reaches against itself",
    "frechet_ratio": "1 is as good as real data",
    "frechet_ratio_logits": "the same on the classifier's logits",
    "frechet_to_half": "lower is better",
    "inception_score": "higher is better",
    "kernel": "0 is as good as real data",
    "near_copies": "no more than near_copies_real",
    "near_copies_real": "what held-out real images have",
    "nearest_ratio": "1 is as far from the data as real images are",
    "precision": "share of samples that look real",
    "recall": "share of the data that is covered",
}


def table(evaluation: Evaluation, other: Evaluation | None = None) -> list[str]:
    """The figures, a line each, with the numbers they rest on, and those of another evaluation on the same terms."""
    lines = [
        f"subject    {evaluation.subject}" + (f"  (model {evaluation.model})" if evaluation.model else ""),
        f"reference  {evaluation.reference}, {evaluation.terms.reference_count:,} images, "
        f"digest {evaluation.terms.reference_digest[:12]}",
        f"network    {evaluation.network_label}",
    ]
    if other is not None:
        lines.append(f"against    {other.subject}" + (f"  (model {other.model})" if other.model else ""))
    beside = "" if other is None else f"{'against':>12}"
    lines.append(f"{'measure':<24}{'value':>12}{beside}{'N':>9}{'N ref':>9}")
    for name, figure in evaluation.metrics.items():
        values = f"{figure.value:>12.5g}"
        if other is not None:
            values += f"{other[name]:>12.5g}" if name in other.metrics else f"{'-':>12}"
        line = f"{name:<24}{values}{figure.n:>9,}{figure.n_reference:>9,}   {_GOOD.get(name, '')}"
        lines.append(line.rstrip())
    return lines
