"""What the entry points name. Imports no torch."""

from typing import Annotated

from pydantic import Field

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.plugins import Plugin, SamplerPlugin


class NetworkSettings(Settings):
    """Of the transformer."""

    patch: Annotated[int, Field(ge=1)] = 2
    """Edge of a patch in pixels."""
    width: Annotated[int, Field(ge=8, multiple_of=8)] = 32
    """Numbers of a token."""
    depth: Annotated[int, Field(ge=1)] = 2
    """Blocks."""


class SourceSettings(Settings):
    """Of the blobs."""

    count: Annotated[int, Field(ge=1)] = 40
    """Images."""
    size: Annotated[int, Field(ge=4)] = 8
    """Edge of an image in pixels."""


class ScheduleSettings(Settings):
    """Of the quadratic schedule."""

    last: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Beta of the last step."""


class FeatureSettings(Settings):
    """Of the means."""

    cells: Annotated[int, Field(ge=1)] = 2
    """Cells along an edge, each a number of the vector."""


class LoggerSettings(Settings):
    """Of the lines."""

    file: str
    """Where they are appended."""


NETWORK = Plugin("tiny_dit.network:build", NetworkSettings)
SAMPLER = SamplerPlugin("tiny_dit.samplers:second_order", draws_noise=False, capturable=True)
CARELESS = SamplerPlugin("tiny_dit.samplers:careless")
MISCOUNTED = SamplerPlugin(
    "tiny_dit.samplers:second_order", levels=lambda num_steps, settings: range(2 * num_steps)
)
SCHEDULE = Plugin("tiny_dit.schedules:quadratic", ScheduleSettings)
FEATURES = Plugin("tiny_dit.features:open_means", FeatureSettings)
METRIC = Plugin("tiny_dit.features:brightness")
LOGGER = Plugin("tiny_dit.lines:open_lines", LoggerSettings)
SOURCE = Plugin("tiny_dit.blobs:open_blobs", SourceSettings)
