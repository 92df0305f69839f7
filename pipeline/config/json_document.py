"""Stored JSON documents: parses an object's bytes as a model, or reports the first error in one line."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from ddpm_pipeline.errors import DamageError

M = TypeVar("M", bound=BaseModel)


def parse_document(model: type[M], data: bytes, where: str, what: str) -> M:
    """`data` as `model`. Raises DamageError: `where: not what (field: reason)`.

    pydantic's own parser reads the bytes: unlike the standard library's, it refuses endless nesting.
    """
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise DamageError(f"{where}: not {what} ({first_fault(error)})") from None


def first_fault(error: ValidationError) -> str:
    """The first error, as `field: reason`."""
    fault = error.errors(include_url=False)[0]
    field = field_of(fault["loc"])
    return f"{field}: {fault['msg']}" if field else fault["msg"]


def field_of(place: tuple[int | str, ...]) -> str:
    """A location reported by pydantic, in the notation of settings: `a.b.0`. In brackets stand a mapping's key, and the
    form of a network.
    """
    return ".".join(str(part) for part in place if not str(part).startswith("["))
