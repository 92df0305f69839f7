"""Settings of the nightly job."""

import re

from pydantic import Field, field_validator

from pipeline.config.base import Settings
from pipeline.config.evaluation import EvaluateConfig
from pipeline.config.generation import GenerateConfig


class DriftConfig(Settings):
    """When a night differs too much from those before it."""

    nights: int = Field(default=7, ge=2)
    """Trailing nights that make the yardstick; fewer than three judge nothing."""
    metrics: tuple[str, ...] = ("frechet", "class_accuracy", "near_copies")
    """Figures that are watched, where they exist."""
    max_deviations: float = Field(default=4.0, gt=0)
    """Largest distance from the trailing mean, in the trailing standard deviations."""
    min_share: float = Field(default=0.1, ge=0)
    """A change below this share of the trailing mean is never drift, however steady the nights were."""


class NightlyConfig(Settings):
    """Every night's generation, evaluated and filed."""

    generate: GenerateConfig
    """What a night makes. `output` is the prefix of all nights; a night fills `<output>/date=YYYY-MM-DD/`. Its seed
    is `seed * 10^8 + YYYYMMDD`, so that no two nights make the same images."""
    evaluate: EvaluateConfig
    """The measure."""
    drift: DriftConfig = DriftConfig()
    """When to raise the alarm."""
    keep_nights: int | None = Field(default=30, ge=1)
    """Nights whose samples are kept; older ones are deleted, but never the one that latest.json names. Their records
    stay. None = all."""
    keep_days: int | None = Field(default=None, ge=1)
    """Age, in days, from which samples are deleted, under the same exception. None = no limit."""
    catch_up_nights: int = Field(default=7, ge=1)
    """Without dates, nights since the last complete one are made too, at most so many."""
    webhook: str | None = None
    """URL that is sent a JSON document when a night fails or drifts. None = the exit code alone tells."""
    max_shown: int = Field(default=14, ge=1)
    """Contact sheets on the history page, newest first."""

    @field_validator("webhook")
    @classmethod
    def _is_an_address(cls, webhook: str | None) -> str | None:
        """A webhook's path is often its secret, so what is wrong with it is said without it."""
        if webhook is not None and not re.match(r"https?://[^/\s]", webhook):
            raise ValueError("not an http(s) address; write https://…")
        return webhook
