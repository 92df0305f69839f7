"""Jobs: one module each, configuration in, exit code out; and the command line over them."""

import sys
from importlib.util import find_spec
from pathlib import Path

_MODULES = {"pipeline": "telemetry/redaction.py", "infra": "local/client_environment.py"}
"""A module by which our package of this name is known: on a cluster each lies in a folder of its own."""


def foreign_package(name: str) -> str | None:
    """Where `name` is found, when that is another's package; None for ours."""
    spec = find_spec(name)
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    if any((place / _MODULES[name]).is_file() for place in places):
        return None
    return str(places[0] if places else spec and spec.origin)


for _name in _MODULES:
    if (_place := foreign_package(_name)) is not None:
        print(
            f"error: {_name}: Python finds another package of this name, at {_place}, before this program's; take its "
            "folder off PYTHONPATH, or start from another folder",
            file=sys.stderr,
        )
        raise SystemExit(2)
