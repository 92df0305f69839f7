"""Settings files and what they are based on.

A file has one section a job (`train:`, `generate:` …). `base:` names presets or other files, over which it is laid;
`config_version:` the form it is written in. A setting that was renamed is still read, with a warning that has the line
to write.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from ddpm_pipeline.config.plain_yaml import line_of, parse_yaml
from ddpm_pipeline.errors import UserError

log = logging.getLogger(__name__)
Tree = dict[str, Any]
CONFIG_VERSION = 1
"""The form of settings files that this program writes and reads."""
BASE = "base"
VERSION_KEY = "config_version"
HEAD = (BASE, VERSION_KEY)
"""What a file may hold besides its sections."""
_SUFFIXES = (".yaml", ".yml")
_MOST_FILES = 100


def read_yaml(file: Path) -> Tree:
    """The mapping a YAML file holds. Raises UserError for a file that is absent or is no such mapping."""
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a number of miles
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file}: not valid YAML ({reason}); correct the file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}; a mapping of sections is expected")
    return cast(Tree, content)


def with_bases(files: Sequence[Path], presets: Mapping[str, Path]) -> Iterator[tuple[Tree, Path]]:
    """The content of each file, what it is based on first. UserError for a base that is neither preset nor file."""
    for number, layer in enumerate(_layers(files, presets, ()), 1):
        if number > _MOST_FILES:
            raise UserError(f"{files[0]}: is based on more than {_MOST_FILES} files; leave bases out")
        yield layer


def _layers(
    files: Sequence[Path], presets: Mapping[str, Path], above: tuple[Path, ...]
) -> Iterator[tuple[Tree, Path]]:
    for file in files:
        content = read_yaml(file)
        _require_version(content, file)
        here = (*above, file.resolve())
        bases = _bases(content, file, presets)
        for base in bases:
            if base.resolve() in here:
                raise UserError(f"{file}: base '{base}' is based on this file itself; leave it out")
        yield from _layers(bases, presets, here)
        yield content, file


def _require_version(content: Tree, file: Path) -> None:
    version: object = content.get(VERSION_KEY, CONFIG_VERSION)
    if version != CONFIG_VERSION or version is True:
        raise UserError(
            f"{file}: {VERSION_KEY} is {version!r}, this program reads {CONFIG_VERSION}; correct it, or use the "
            "version of ddpm-pipeline that the file is for"
        )


def _bases(content: Tree, file: Path, presets: Mapping[str, Path]) -> list[Path]:
    """The files that `base` names: presets by their names, files by their paths from the folder of this one."""
    given = content.get(BASE)
    names = [] if given is None else cast(list[Any], given) if isinstance(given, list) else [given]
    return [_base(name, file, presets) for name in names]


def _base(name: object, file: Path, presets: Mapping[str, Path]) -> Path:
    if isinstance(name, str) and name in presets and presets[name] != file:
        return presets[name]
    if isinstance(name, str) and name.endswith(_SUFFIXES):
        return file.parent / Path(name).expanduser()
    raise UserError(
        f"{file}: base '{name}' is no preset and no path of a .yaml file; known presets are "
        f"{', '.join(sorted(presets))}"
    )


def with_new_names(tree: Tree, renamed: Mapping[str, str], section: str, file: Path | None = None) -> Tree:
    """The settings of a section with each renamed one under its new name, and a warning with the line to write.

    `renamed` maps former names to new ones, both dotted. UserError where a file or call has both.
    """
    for old, new in renamed.items():
        value = _get(tree, old)
        if value is None:
            continue
        where = _place(file, section, old)
        if _get(tree, new) is not None:
            raise UserError(
                f"{where}{section}.{old} is now {section}.{new}, which is set as well; remove the former"
            )
        log.warning(
            "%s%s.%s is now %s.%s; write: %s",
            where,
            section,
            old,
            section,
            new,
            _line(section, new, value, file),
        )
        tree = _put(_without(tree, old.split(".")), new.split("."), value)
    return tree


def _place(file: Path | None, section: str, name: str) -> str:
    if file is None:
        return ""
    line = line_of(file.read_text(encoding="utf-8"), (section, *name.split(".")))
    return f"{file}: " if line is None else f"{file}:{line}: "


def _line(section: str, name: str, value: object, file: Path | None) -> str:
    """What to write: a line of YAML, or a word of the command line."""
    plain = (
        yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
    )
    if file is None:
        return f"{name}={plain}"
    opening, closing = "", ""
    for part in (section, *name.split(".")[:-1]):
        opening, closing = f"{opening}{part}: {{", closing + "}"
    return f"{opening}{name.rpartition('.')[2]}: {plain}{closing}"


def _get(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = cast(Tree, tree).get(part) if isinstance(tree, dict) else None
    return tree


def _without(tree: Tree, path: Sequence[str]) -> Tree:
    """The tree without the value at a path, and without groups that this empties."""
    rest = {name: value for name, value in tree.items() if name != path[0]}
    if len(path) == 1:
        return rest
    below = _without(tree[path[0]], path[1:])
    return {**rest, path[0]: below} if below else rest


def _put(tree: Tree, path: Sequence[str], value: Any) -> Tree:
    below = value if len(path) == 1 else _put(tree.get(path[0]) or {}, path[1:], value)
    return {**tree, path[0]: below}
