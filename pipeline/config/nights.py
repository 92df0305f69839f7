"""Settings of the nightly job."""

import re

from pydantic import Field, field_validator

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.evaluation import EvaluateConfig
from ddpm_pipeline.config.generation import GenerateConfig


class DriftConfig(Settings):
    """When a night differs too much from the nights before it."""

    nights: int = Field(default=7, ge=2)
    """Trailing nights to compare with; with fewer than three there is no drift."""
    metrics: tuple[str, ...] = ("frechet", "class_accuracy", "near_copies")
    """Metrics that are watched, where they exist."""
    max_deviations: float = Field(default=4.0, gt=0)
    """Largest accepted distance from the trailing mean, in trailing standard deviations."""
    min_share: float = Field(default=0.1, ge=0)
    """A change below this share of the trailing mean is never drift, however small the deviation."""


class NightlyConfig(Settings):
    """The nightly generation, evaluated and recorded."""

    generate: GenerateConfig
    """The generation of a night. `output` is the prefix of all nights; a night fills `<output>/date=YYYY-MM-DD/`. Its
    seed is `seed * 10^8 + YYYYMMDD`, so that no two nights make the same images."""
    evaluate: EvaluateConfig
    """How a night is evaluated."""
    drift: DriftConfig = DriftConfig()
    """When an alert is sent."""
    require_signed: str | None = None
    """Public key, its file or the line that `ddpm keys show` prints: nights use only a model whose promotion by the
    gate is signed with it. None = any model."""
    keep_nights: int | None = Field(default=30, ge=1)
    """Number of nights whose samples are kept; older samples are deleted, except those that latest.json names. Records
    stay. None = all."""
    keep_days: int | None = Field(default=None, ge=1)
    """Largest age of kept samples in days, with the same exception. None = no limit."""
    catch_up_nights: int = Field(default=7, ge=1)
    """Largest number of nights that a call without dates makes: those since the last complete one."""
    webhook: str | None = None
    """URL that gets a JSON document when a night fails or drifts. None = only the exit code tells."""
    max_shown: int = Field(default=14, ge=1)
    """Contact sheets on the history page, newest first."""

    @field_validator("webhook")
    @classmethod
    def _is_an_address(cls, webhook: str | None) -> str | None:
        """The path of a webhook is often a secret, so the message does not repeat it."""
        if webhook is not None and not re.match(r"https?://[^/\s]", webhook):
            raise ValueError("not an http(s) URL; write https://…")
        return webhook
