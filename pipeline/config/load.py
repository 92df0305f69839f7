"""From files and `key=value` words to one validated settings object.

A settings file has one section a job (`pack:`, `train:`, `generate:` …), so one file describes a whole
pipeline and presets are nothing but such files. Later files win over earlier ones, overrides win over all.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from typing_extensions import TypeAliasType

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.json_document import field_of
from ddpm_pipeline.config.plain_yaml import parse_yaml
from ddpm_pipeline.config.settings_files import HEAD, Tree, with_bases, with_new_names
from ddpm_pipeline.errors import UserError

S = TypeVar("S", bound=Settings)
ROOT_VARIABLE = "DDPM_ROOT"
ROOT = "{root}"
_VARIABLE = re.compile(r"\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET = re.compile(r"secret|password|passwd|token|key|credential", re.IGNORECASE)


def load_settings(
    model: type[S],
    section: str,
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    sections: Sequence[str] = (),
    presets: Mapping[str, Path] | None = None,
    values: Mapping[str, Any] | None = None,
) -> S:
    """Merge `section` of each file, apply the overrides and `values` (by dotted name or nested), validate.

    A file that says `base:` is laid over the presets or files that this names, later ones winning.
    `{root}` in any text stands for $DDPM_ROOT, where this installation keeps data, runs and outputs, and `{env:NAME}`
    for the variable NAME; nothing else in a setting is taken from the environment.
    `sections` are the section names a file may hold besides `section`.
    Raises UserError naming the setting, what is wrong with it, and the nearest known name for a mistyped one.
    """
    tree = merged_files(model, section, files, sections=sections, presets=presets or {})
    said: Tree = {}
    for word in overrides:
        said = _merged(said, _override(word, model))
    for name, value in (values or {}).items():
        said = _merged(said, _nested(name, _plain(value)))
    return _validated(model, section, _merged(tree, with_new_names(said, model.renamed, section)))


def merged_files(
    model: type[S],
    section: str,
    files: Sequence[Path],
    *,
    sections: Sequence[str],
    presets: Mapping[str, Path],
) -> Tree:
    """What files with their bases say in a section, not yet validated. Raises UserError as `load_settings` does."""
    tree: Tree = {}
    for content, file in with_bases(files, presets):
        said = _section(content, file, section, {section, *sections})
        tree = _merged(tree, with_new_names(said, model.renamed, section, file))
    return tree


def changed_settings(settings: S, section: str, values: Mapping[str, Any]) -> S:
    """The settings with other values, by dotted name or nested. Raises UserError as `load_settings` does."""
    tree = settings.model_dump()
    for name, value in values.items():
        tree = _merged(tree, _nested(name, _plain(value)))
    return _validated(type(settings), section, tree)


def _validated(model: type[S], section: str, tree: Tree) -> S:
    tree = _replaced(tree, _with_variables)
    try:
        plain = model.model_validate(tree).model_dump()  # with the defaults, which may speak of {root} too
        return model.model_validate(_replaced(plain, _with_root))
    except ValidationError as error:
        raise UserError(_one_line(error, model, section)) from None


def setting_names(model: type[BaseModel]) -> Iterator[str]:
    """Every setting of a model as a dotted name, once, groups before their members."""
    return iter(dict.fromkeys(name for name, _ in described_settings(model)))


def described_settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting as (dotted name, its description; a group's is its type's)."""
    for name, field in model.model_fields.items():
        groups = list(_groups(field.annotation))
        own = field.description or " ".join(group.__doc__ or "" for group in groups)
        yield prefix + name, own
        for group in groups:
            yield from described_settings(group, f"{prefix}{name}.")


def _groups(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings groups inside a field's type: the type itself, or members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _groups(part)


def _section(content: Tree, file: Path, section: str, known: set[str]) -> Tree:
    for name in content:
        if name not in {*known, *HEAD}:
            raise UserError(f"{file}: unknown section '{name}'; {_suggestion(str(name), sorted(known))}")
    part = content.get(section) or {}
    if not isinstance(part, dict):
        raise UserError(f"{file}: section '{section}' holds no settings; write 'name: value' lines below it")
    return cast(Tree, part)


def _override(word: str, model: type[BaseModel]) -> Tree:
    name, equals, text = word.partition("=")
    if not equals or not name:
        raise UserError(
            f"'{word}': not a setting; write key=value, for example {next(setting_names(model))}=…"
        )
    return _nested(name, _value(text, list(_kinds(model, name.split(".")))))


def _nested(name: str, value: Any) -> Tree:
    """A value under its dotted name."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return cast(Tree, value)


def _plain(value: Any) -> Any:
    """A value with the groups of settings in it as mappings."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in cast(Mapping[str, Any], value).items()}
    return str(value) if isinstance(value, Path) else value


def _value(text: str, kinds: Sequence[Any]) -> Any:
    """What a word says: the very text for a setting that is text, and YAML for others."""
    of_text = [_is_text(kind) for kind in kinds if kind is not type(None)]
    if of_text and all(of_text):
        return None if text == "null" and type(None) in kinds else text
    lists_of_text = [_holds_text(kind) for kind in kinds if kind is not type(None)]
    try:
        all_text = bool(lists_of_text) and all(lists_of_text) and text != "null"
        stands_for = ROOT in text or _VARIABLE.search(text)
        return text if stands_for else parse_yaml(text, all_text=all_text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text  # plain text with YAML's signs in it; refused below where a number belongs


def _kinds(kind: Any, path: Sequence[str]) -> Iterator[Any]:
    """The types that the setting at `path` below a type may have, unions taken apart."""
    if isinstance(kind, TypeAliasType):
        yield from _kinds(kind.__value__, path)
    elif get_origin(kind) is Annotated:
        yield from _kinds(get_args(kind)[0], path)
    elif get_origin(kind) in (Union, UnionType):
        for part in get_args(kind):
            yield from _kinds(part, path)
    elif not path:
        yield kind
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        if (field := kind.model_fields.get(path[0])) is not None:
            yield from _kinds(field.annotation, path[1:])
    elif get_origin(kind) is dict:
        yield from _kinds(get_args(kind)[1], path[1:])


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(value, str) for value in get_args(kind))
    return isinstance(kind, type) and issubclass(kind, str | Path)


def _holds_text(kind: Any) -> bool:
    """Whether it is a list or mapping of nothing but text."""
    parts = [part for part in get_args(kind) if part is not ...]
    return get_origin(kind) in (list, tuple, set, frozenset, dict) and all(
        _is_text(part) for inner in parts for part in _kinds(inner, ())
    )


def _merged(low: Tree, high: Tree) -> Tree:
    """`high` laid over `low`: mappings merge key by key, everything else is replaced."""
    out = dict(low)
    for key, value in high.items():
        below = out.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        out[key] = _merged(cast(Tree, below), cast(Tree, value)) if both else value
    return out


def _replaced(value: Any, replace: Callable[[str], str]) -> Any:
    """A value with every text in it replaced."""
    if isinstance(value, Mapping):
        return {key: _replaced(part, replace) for key, part in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list):
        return [_replaced(part, replace) for part in cast(list[Any], value)]
    return replace(value) if isinstance(value, str) else value


def _with_root(text: str) -> str:
    return text.replace(ROOT, _root(text)) if ROOT in text else text


def _with_variables(text: str) -> str:
    return _VARIABLE.sub(lambda found: _variable(found[1], text), text)


def _root(text: str) -> str:
    root = os.environ.get(ROOT_VARIABLE)
    if not root:
        raise UserError(
            f"{ROOT_VARIABLE}: not set, but '{text}' needs it; start the local stack with `ddpm up`, "
            f"or export {ROOT_VARIABLE}=s3://your-bucket"
        )
    return root.rstrip("/")


def _variable(name: str, text: str) -> str:
    if _SECRET.search(name):
        raise UserError(
            f"'{text}': {name} looks like a secret, which runs and jobs would store with the settings; leave it to the "
            "environment of the program that needs it"
        )
    value = os.environ.get(name)
    if value is None:
        raise UserError(f"{name}: not set, but '{text}' needs it; export {name}=…")
    return value


def _one_line(error: ValidationError, model: type[BaseModel], section: str) -> str:
    faults = error.errors(include_url=False)
    fault = faults[0]
    name = field_of(fault["loc"])
    where = f"{section}.{name}" if name else section
    more = f" ({len(faults) - 1} more after this one)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown setting; {_suggestion(name, list(setting_names(model)))}{more}"
    if fault["type"] == "missing":
        return f"{where}: required, but not given; add {name}=… or set it in a --config file{more}"
    message = fault["msg"].removeprefix("Value error, ")
    got = "" if fault["type"] == "value_error" else f", not {fault['input']!r}"
    return f"{where}: {message[:1].lower()}{message[1:]}{got}{more}"


def _suggestion(name: str, known: list[str]) -> str:
    last = name.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [
        full for full in known if difflib.SequenceMatcher(None, last, full.rsplit(".", 1)[-1]).ratio() > 0.75
    ]
    if near:
        return f"did you mean '{near[0]}'?"
    return "known here: " + ", ".join(k for k in known if "." not in k)
