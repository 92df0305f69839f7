"""A line of `ddpm doctor`'s report."""

from dataclasses import dataclass

from ddpm_pipeline.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    ok: bool
    found: str
    """What was found, or what is wrong."""
    remedy: str = ""
    """What to do about it; empty when all is well."""


def refused(name: str, error: UserError) -> Finding:
    """The finding for a UserError, which names the fault and, after its last colon or semicolon, the remedy."""
    text = str(error)
    cut = max(text.rfind("; "), text.rfind(": "))
    return Finding(name, False, text[:cut], text[cut + 2 :]) if cut > 0 else Finding(name, False, text)
