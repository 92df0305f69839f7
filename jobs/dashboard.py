"""Questions to the dashboard of a Ray cluster, which also is its job server."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.local.service import get

ADDRESS_VARIABLE = "RAY_JOB_ADDRESS"


def ask(path: str, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What the dashboard that RAY_JOB_ADDRESS names answers to `path`; empty when it does not know or answer."""
    url = environ.get(ADDRESS_VARIABLE, "").rstrip("/")
    answer = get(f"{url}{path}", {"Authorization": f"Bearer {_token(environ)}"})
    return json.loads(answer or b"{}")


def _token(environ: Mapping[str, str]) -> str:
    path = environ.get("RAY_AUTH_TOKEN_PATH")
    return (environ.get("RAY_AUTH_TOKEN") or (Path(path).read_text() if path else "")).strip()
