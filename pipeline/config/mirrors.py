"""Settings of the run loggers of this package."""

from pydantic import Field

from ddpm_pipeline.config.base import Settings


class TensorBoardSettings(Settings):
    """Event files for TensorBoard, in a folder for each run."""

    folder: str | None = Field(default=None, min_length=1)
    """Folder for the folders of runs, on the machine of the worker that logs. None: `$XDG_STATE_HOME/ddpm/tensorboard`,
    else `~/.local/state/ddpm/tensorboard`."""


class TrackioSettings(Settings):
    """A project of Trackio, in its own local database (`TRACKIO_DIR`)."""

    project: str = Field(default="ddpm", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    """Name of the project."""
