"""`ddpm config diff A B`: the settings in which two presets or files differ, with their bases and the defaults."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from ddpm_pipeline.config.load import merged_files
from ddpm_pipeline.jobs.runner import DONE, FAILED, SECTIONS, preset_file, presets
from ddpm_pipeline.telemetry.terminal import echo, echo_json

Flat = dict[str, Any]
_ABSENT = "-"


def diff(left: str, right: str, as_json: bool = False) -> int:
    """Print a line for each setting that differs; exit code 1 if there is one, as diff has it.

    Raises UserError for what is neither preset nor file.
    """
    found = differences(_file(left), _file(right))
    if as_json:
        echo_json({name: {"a": a, "b": b} for name, (a, b) in found.items()})
    elif found:
        rows = [("", left, right), *((name, _text(a), _text(b)) for name, (a, b) in found.items())]
        widths = [max(len(row[place]) for row in rows) for place in (0, 1)]
        echo(*(f"{name:<{widths[0]}}  {a:<{widths[1]}}  {b}".rstrip() for name, a, b in rows))
    else:
        echo(f"{left} and {right} say the same")
    return FAILED if found else DONE


def differences(left: Path, right: Path) -> dict[str, tuple[Any, Any]]:
    """The dotted names of settings that differ, with both values; None for one that only the other file has."""
    found: dict[str, tuple[Any, Any]] = {}
    for section in SECTIONS:
        a, b = _settings(section, left, right)
        found |= {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}
    return found


def _settings(section: str, left: Path, right: Path) -> tuple[Flat, Flat]:
    """The settings of a section with their defaults; without, where one file leaves out what is required."""
    model, known = SECTIONS[section], tuple(SECTIONS)
    trees = [
        merged_files(model, section, [file], sections=known, presets=presets()) for file in (left, right)
    ]
    with suppress(ValidationError):
        trees = [model.model_validate(tree).model_dump(mode="json") if tree else tree for tree in trees]
    a, b = ({f"{section}.{name}": value for name, value in _flat(tree).items()} for tree in trees)
    return a, b


def _file(name: str) -> Path:
    """A preset's file by its name, or a file by its path."""
    return preset_file(name) if name in presets() or not name.endswith((".yaml", ".yml")) else Path(name)


def _flat(tree: dict[str, Any], prefix: str = "") -> Flat:
    flat: Flat = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(cast(dict[str, Any], value), f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _text(value: object) -> str:
    return _ABSENT if value is None else value if isinstance(value, str) else json.dumps(value)
