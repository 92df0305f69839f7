"""Settings of experiment tracking: where runs are filed and how their metrics travel."""

from typing import cast

from pydantic import BeforeValidator, Field

from ddpm_pipeline.config.base import Settings


class TrackConfig(Settings):
    """How a job reports to MLflow. None of these settings changes a model or a sample."""

    experiment: str = Field(default="ddpm", min_length=1, max_length=500)
    """MLflow experiment that holds the run; made when it is missing."""

    color: str | None = Field(default=None, pattern=r"^#[0-9a-fA-F]{6}$")
    """Colour of the run in charts as #rrggbb; None lets MLflow choose."""

    send_interval_seconds: float = Field(default=2.0, ge=0.05, le=300.0)
    """Pause between two deliveries from the spool; short enough to watch a run live, and far under 1% of a
    core.
    """

    heartbeat_seconds: float = Field(default=60.0, ge=1.0, le=3600.0)
    """Interval of a running job's heartbeats; `ddpm cleanup --idle-minutes` must be several times this."""

    system_metrics_seconds: float | None = Field(default=30.0, ge=1.0, le=3600.0)
    """Interval of processor, memory and GPU readings, one sampler a node; None disables them."""

    close_timeout_seconds: float = Field(default=60.0, ge=0.0, le=3600.0)
    """How long a finishing job waits for the tracking server; what is left then stays in the spool for a
    replay.
    """


def filed_under(experiment: str) -> BeforeValidator:
    """For a field of TrackConfig: whoever sets something else of it leaves the run in this experiment."""

    def named(value: object) -> object:
        return (
            {"experiment": experiment} | cast(dict[str, object], value) if isinstance(value, dict) else value
        )

    return BeforeValidator(named)
