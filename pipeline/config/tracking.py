"""Settings of experiment tracking: where runs are filed and how their metrics travel."""

from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import BeforeValidator, Field, model_validator

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.plugins import LOGGERS, PluginIdentity, WithPlugin, with_identity


class MirrorConfig(WithPlugin):
    """A run logger that is told what MLflow is told. `kind` alone may be written as its text."""

    PLUGIN_GROUP: ClassVar[str] = LOGGERS

    kind: str = Field(min_length=1, max_length=250)
    """tensorboard or trackio, each an extra of this package, or another package's, by its entry point in
    `ddpm_pipeline.loggers` or as `module:object`."""
    settings: dict[str, Any] | None = None
    """Its settings: of tensorboard `folder`, of trackio `project`."""
    plugin: PluginIdentity | None = None
    """Its package and version; filled in where it is left out."""

    @model_validator(mode="before")
    @classmethod
    def _identified(cls, data: Any) -> Any:
        return with_identity(LOGGERS, {"kind": data} if isinstance(data, str) else data, "")


class TrackConfig(Settings):
    """How a job reports to MLflow. None of these settings changes a model or a sample."""

    experiment: str = Field(default="ddpm", min_length=1, max_length=500)
    """MLflow experiment that holds the run; made when it is missing."""

    color: str | None = Field(default=None, pattern=r"^#[0-9a-fA-F]{6}$")
    """Color of the run in charts as #rrggbb; None lets MLflow choose."""

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

    mirrors: Annotated[tuple[MirrorConfig, ...], Field(max_length=8)] = ()
    """Run loggers that get the run's metrics and images beside MLflow, such as [tensorboard]. MLflow alone registers
    models. They run where rank 0 of a training, or the driver of a generation, runs."""

    @model_validator(mode="after")
    def _mirrors_differ(self) -> Self:
        kinds = [mirror.kind for mirror in self.mirrors]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"mirrors names one twice ({', '.join(kinds)}); name each once")
        return self


def filed_under(experiment: str) -> BeforeValidator:
    """For a field of TrackConfig: whoever sets something else of it leaves the run in this experiment."""

    def named(value: object) -> object:
        return (
            {"experiment": experiment} | cast(dict[str, object], value) if isinstance(value, dict) else value
        )

    return BeforeValidator(named)
