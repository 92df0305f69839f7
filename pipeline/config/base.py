"""Base class of all settings and stored documents."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A group of settings. Immutable; unknown or ill-typed fields, NaN and infinity are refused."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Former names of settings and their present ones, both dotted, for a group that is a section of settings files: a
    former one is read for a version more, with a warning that has the line to write."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


def refuse_idle(settings: Settings, fields: tuple[str, ...], because: str) -> None:
    """Raise ValueError for the first of `fields` that differs from its default although it has no effect."""
    for name in fields:
        if getattr(settings, name) != type(settings).model_fields[name].default:
            raise ValueError(f"{name} has no effect {because}; leave it out")
