"""The records of a spool: one line of JSON each, validated strictly.

File names match a pattern without path separators, so that no record, wherever it came from, names a file outside the
spool. Only points travel in checkpoints.
"""

from pathlib import PurePosixPath
from typing import Annotated, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.json_document import first_fault

MAX_NAME = 250
MAX_TAG = 5000
"""MLflow's limit for the value of a tag."""
MAX_LINE_BYTES = 1 << 24
RUN_ID = r"^[0-9A-Za-z_\-]{1,64}$"

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Name = Annotated[str, Field(pattern=r"^[\w\-./ :]+$", max_length=MAX_NAME)]
FileName = Annotated[str, Field(pattern=r"^[0-9a-f]{32}\.(png|npy|bin)$")]


def _relative(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or not path.isprintable():
        raise ValueError("not a relative path of an artifact")
    return path


class PointRecord(Settings):
    """Values of some metrics at one step. Infinity and NaN are allowed: a loss may be either."""

    model_config = ConfigDict(allow_inf_nan=True)

    t: Int64
    """Unix time in milliseconds."""
    s: Int64
    """The step."""
    m: dict[Name, float]
    """Value by name."""


class ImageRecord(Settings):
    """An image for the run page's step slider."""

    t: Int64
    s: Int64
    i: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_\-./ ]+$", max_length=MAX_NAME)]
    """Its key."""
    f: FileName
    """Its file in the spool."""


class ArtifactRecord(Settings):
    """A file for the run's artifacts."""

    t: Int64
    p: Annotated[str, Field(max_length=500), AfterValidator(_relative)]
    """Its path in the run."""
    f: FileName
    """Its file in the spool."""


class TagsRecord(Settings):
    """Tags of the run."""

    t: Int64
    g: dict[Name, Annotated[str, Field(max_length=MAX_TAG)]]
    """Value by name."""


T = TypeVar("T")
Record = PointRecord | ImageRecord | ArtifactRecord | TagsRecord
_ANY: TypeAdapter[Record] = TypeAdapter(Record)
_POINT = TypeAdapter(PointRecord)


def parse_record(line: bytes) -> Record:
    """A line of a spool. Raises ValueError in one line for anything else."""
    return _parsed(_ANY, line)


def parse_point(line: bytes) -> PointRecord:
    """A line with metrics. Raises ValueError in one line for anything else."""
    return _parsed(_POINT, line)


def _parsed(adapter: TypeAdapter[T], line: bytes) -> T:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"{len(line)} bytes, more than a record may have")
    try:
        return adapter.validate_json(line)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None
