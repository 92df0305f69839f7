"""The common ground of all settings: frozen, closed, and complete."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A group of settings. Immutable; an unknown or ill-typed field is refused when it is read, and so is a number that
    is none, or infinite."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


def refuse_idle(settings: Settings, fields: tuple[str, ...], because: str) -> None:
    """Raise ValueError for the first of `fields` that was moved from its default although it has no
    effect."""
    for name in fields:
        if getattr(settings, name) != type(settings).model_fields[name].default:
            raise ValueError(f"{name} has no effect {because}; leave it out")
