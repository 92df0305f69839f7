"""The common ground of all settings: frozen, closed, and complete."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A group of settings. Immutable; an unknown or ill-typed field is refused when it is read."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )
