"""Questions to the dashboard of a Ray cluster, which also is its job server, and which one is meant."""

import json
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from infra.local.service import get
from pipeline.errors import UserError
from pipeline.telemetry.redaction import redact
from pipeline.telemetry.terminal import echo

ADDRESS_VARIABLE = "RAY_JOB_ADDRESS"
RAYS_VARIABLE = "RAY_API_SERVER_ADDRESS"
"""Ray's own name for it, which its job client obeys before any address that it is given."""
DRIVER_VARIABLE = "RAY_ADDRESS"
"""Where a driver joins (host:port); Ray's own tools also take a dashboard's http address there."""


def dashboard_address(environ: Mapping[str, str] = os.environ) -> str | None:
    """The dashboard that is meant: ours before Ray's names for it. None where no variable names one."""
    named = _named(environ)
    return next(iter(named.values()), None)


def settle_address(environ: MutableMapping[str, str] = os.environ) -> None:
    """Make the dashboard that is meant the one that Ray uses, too; say which variables name another.

    To be called before Ray is imported. UserError for an address that is no http one.
    """
    named = _named(environ)
    if not named:
        return
    (variable, address), *others = named.items()
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"{variable} {redact(address)}: no dashboard's address; write it as http://ray.example:8265"
        )
    for other, value in others:
        if value != address:
            echo(f"note     {variable} {address} is used; {other} names {value}", error=True)
    environ[ADDRESS_VARIABLE] = environ[RAYS_VARIABLE] = address
    settle_token(environ)


def settle_token(environ: MutableMapping[str, str] = os.environ) -> None:
    """A token that is given is meant to be used, also where Ray's switch for it is not set."""
    if environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH"):
        environ.setdefault("RAY_AUTH_MODE", "token")


def ask(path: str, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What the dashboard answers to `path`; empty when it does not know or answer."""
    answer = get(f"{dashboard_address(environ)}{path}", {"Authorization": f"Bearer {_token(environ)}"})
    return json.loads(answer or b"{}")


def _named(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that name a dashboard, the one that is obeyed first, without slashes at the end."""
    driver = environ.get(DRIVER_VARIABLE, "")
    values = {
        ADDRESS_VARIABLE: environ.get(ADDRESS_VARIABLE, ""),
        RAYS_VARIABLE: environ.get(RAYS_VARIABLE, ""),
        DRIVER_VARIABLE: driver if driver.startswith(("http://", "https://")) else "",
    }
    return {variable: value.rstrip("/") for variable, value in values.items() if value}


def _token(environ: Mapping[str, str]) -> str:
    path = environ.get("RAY_AUTH_TOKEN_PATH")
    return (environ.get("RAY_AUTH_TOKEN") or (Path(path).read_text() if path else "")).strip()
