"""What settings files may hold, generated from the models: a page for people, a JSON schema for editors.

python -m ddpm_pipeline.jobs.config_docs      rewrites docs/configuration.md and docs/schema/settings.json
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic.json_schema import JsonSchemaMode, models_json_schema

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.load import ROOT_VARIABLE
from ddpm_pipeline.config.settings_files import BASE, CONFIG_VERSION, VERSION_KEY
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.installation import checkout
from ddpm_pipeline.jobs.runner import DONE, SECTIONS, presets
from ddpm_pipeline.telemetry.terminal import echo

Schema = dict[str, Any]
SCHEMA_FILE = "ddpm.schema.json"
_MODE: JsonSchemaMode = "validation"
_SECTION_OF_MODEL = {model.__name__: name for name, model in SECTIONS.items()}
_OPENING = f"""# Configuration

*Written by `make docs` from the models in `pipeline/config`; a test compares.*

Every job reads its settings from one section of a settings file. The layers, later ones winning: the defaults
below, a preset (its first word on the command line), `--config FILE` (may be repeated), `key=value` words with dots for
groups (`optimizer.lr=1e-4`). `--dry-run` prints what comes of it, in a form that `--config` reads.
`ddpm config diff A B` compares two presets or files.

A file may be laid over others: `{BASE}: digits` over a preset, `{BASE}: team.yaml` over a file beside it,
`{BASE}: [digits, team.yaml]` over both, the later one winning. `{VERSION_KEY}: {CONFIG_VERSION}` says which form of
settings it is written in; a program that reads another one refuses it. A renamed setting is read for one more version,
with a warning that names file, line and what to write.

In a setting, `{{root}}` stands for `${ROOT_VARIABLE}` and `{{env:NAME}}` for the variable `NAME`, which must be set.
Nothing else is taken from the environment: `$NAME` stays as it is. Names of secrets are refused, because runs and jobs
store their settings.

For completion and checking in an editor that speaks yaml-language-server (VS Code, Neovim, JetBrains), run
`ddpm schema` beside your file and begin it with

```yaml
# yaml-language-server: $schema={SCHEMA_FILE}
```
"""


def main() -> int:
    """Rewrite both files."""
    repository = checkout()
    if repository is None:
        sys.exit(
            "error: the documents are in a checkout of the repository only; for the schema: ddpm schema FOLDER"
        )
    docs = repository / "docs"
    (docs / "schema").mkdir(exist_ok=True)
    (docs / "configuration.md").write_text(configuration_page(), encoding="utf-8")
    (docs / "schema" / "settings.json").write_text(schema_text(), encoding="utf-8")
    return DONE


def write_schema(folder: Path) -> int:
    """Write the schema into `folder` and print how to point an editor at it. UserError when it cannot be written."""
    file = folder / SCHEMA_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(schema_text(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); name another folder") from None
    echo(f"schema   {file}")
    echo(f"next     begin your YAML file with:  # yaml-language-server: $schema={file}")
    return DONE


def schema_text() -> str:
    """`settings_schema` as it is filed."""
    return json.dumps(settings_schema(), indent=2, ensure_ascii=False) + "\n"


def settings_schema() -> Schema:
    """JSON schema (draft 2020-12) of a settings file: every section, nothing required, for layers may be partial."""
    sections, shared = _schemas()
    first_lines = {name: model.__doc__ or "" for name, model in SECTIONS.items()}
    one = {"anyOf": [{"enum": list(presets())}, {"type": "string", "pattern": r"\.ya?ml$"}]}
    base = {
        "anyOf": [one, {"type": "array", "items": one}],
        "description": "Presets, or files by their paths from this one, that this file is laid over; later ones win.",
    }
    version = {
        "const": CONFIG_VERSION,
        "description": "The form of settings files that this one is written in.",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of the diffusion pipeline",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            VERSION_KEY: version,
            BASE: base,
            **{name: {**sections[name], "description": first_lines[name]} for name in SECTIONS},
        },
        "$defs": {name: _partial(schema) for name, schema in shared.items()},
    }


def configuration_page() -> str:
    """Every setting of every section with its type, default and meaning, as Markdown."""
    _, shared = _schemas()
    groups = sorted(set(shared) - set(_SECTION_OF_MODEL))
    parts = [_OPENING, "## Sections\n"]
    parts += [f"### {name}\n\n{_table(shared[model], shared)}" for model, name in _SECTION_OF_MODEL.items()]
    parts += ["## Groups\n", *(f"### {name}\n\n{_table(shared[name], shared)}" for name in groups)]
    return "\n".join(parts)


def _schemas() -> tuple[dict[str, Schema], dict[str, Schema]]:
    """(section -> reference to its model's schema, model's name -> schema)."""
    models: list[tuple[type[Settings], JsonSchemaMode]] = [(model, _MODE) for model in SECTIONS.values()]
    references, definitions = models_json_schema(models)
    return {name: dict(references[model, _MODE]) for name, model in SECTIONS.items()}, definitions["$defs"]


def _partial(schema: Schema) -> Schema:
    """A group of which a layer may give any part, so that a part may be one of several forms of a group alike."""
    partial = {key: value for key, value in schema.items() if key != "required"}
    fields: dict[str, Schema] = partial.get("properties", {})
    forms = {name: {"anyOf": field["oneOf"]} for name, field in fields.items() if "oneOf" in field}
    rest = {
        name: {key: value for key, value in field.items() if name not in forms or key != "oneOf"}
        for name, field in fields.items()
    }
    return partial | {"properties": {name: field | forms.get(name, {}) for name, field in rest.items()}}


def _table(schema: Schema, shared: Mapping[str, Schema]) -> str:
    required = schema.get("required", [])
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        default = "required" if name in required else _default(field)
        group = field.get("$ref", "").rpartition("/")[2]
        about = field.get("description") or shared.get(group, {}).get("description", "")
        cells = (f"`{name}`", " or ".join(_types(field)), default, about)
        rows.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    about = " ".join(schema.get("description", "").split())
    return "\n".join([about, "", *rows, ""])


def _default(field: Mapping[str, Any]) -> str:
    if "default" not in field:
        return "its own defaults"
    value = field["default"]
    if isinstance(value, dict) and value:
        return "its own defaults"
    return "none" if value is None else f"`{json.dumps(value)}`"


def _types(field: Mapping[str, Any]) -> Iterator[str]:
    """The kinds of value a field takes, with their bounds."""
    if "prefixItems" in field:
        yield "[" + ", ".join(" or ".join(_types(part)) for part in field["prefixItems"]) + "]"
        return
    if "$ref" in field:
        group = field["$ref"].rsplit("/", 1)[-1]
        yield f"[{group}](#{_SECTION_OF_MODEL.get(group, group.lower())})"
    elif "anyOf" in field or "oneOf" in field:
        for part in field.get("anyOf") or field["oneOf"]:
            yield from _types(part)
    elif "enum" in field or "const" in field:
        yield ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    elif field.get("type") == "array":
        yield f"list of {' or '.join(_types(field.get('items', {})))}"
    elif field.get("type") == "object":
        values = field.get("additionalProperties")
        yield f"mapping to {' or '.join(_types(values))}" if isinstance(values, dict) else "mapping"
    elif field.get("type") != "null":
        yield field.get("type", "anything") + _bounds(field)


def _bounds(field: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[key]:.12g}" for key, sign in signs.items() if key in field]
    if "pattern" in field:
        bounds.append(f"like `{field['pattern']}`")
    return f", {', '.join(bounds)}" if bounds else ""


if __name__ == "__main__":
    sys.exit(main())
