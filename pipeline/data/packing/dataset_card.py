"""A Hugging Face data set's README.md: its YAML head names configurations, splits and classes."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from ddpm_pipeline.config.plain_yaml import parse_yaml

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20
Card = dict[str, Any]


class DataFiles(NamedTuple):
    """Files of a configuration, by a pattern or folder."""

    split: str | None
    pattern: str

    def matches(self, path: str) -> bool:
        return fnmatch.fnmatchcase(path, self.pattern) or path.startswith(f"{self.pattern.rstrip('/')}/")


def parse_card(text: str) -> Card:
    """The YAML head of a README; empty without one, and for one that is damaged or of another kind."""
    begin, _, rest = text.removeprefix("\ufeff").lstrip().partition("\n")
    head, end, _ = rest.partition("\n---")
    if begin.strip() != "---" or not end:
        return {}
    try:
        found = parse_yaml(head)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return cast(Card, found) if isinstance(found, dict) else {}


def read_card(folder: Path) -> Card:
    """The YAML head of the README in a folder; empty if there is none."""
    try:
        with (folder / CARD).open("rb") as file:
            return parse_card(file.read(MAX_CARD_BYTES).decode(errors="replace"))
    except OSError:
        return {}


def configurations(card: Card) -> dict[str, list[DataFiles]]:
    """The data files of each configuration that the card names."""
    found: dict[str, list[DataFiles]] = {}
    for entry in _mappings(card.get("configs")):
        name, files = entry.get("config_name", "default"), entry.get("data_files")
        found[str(name)] = list(_data_files(files))
    return {name: files for name, files in found.items() if files}


def default_configuration(card: Card) -> str | None:
    """The configuration that is meant when none is named: the only one, or the one that the card marks."""
    entries = {str(entry.get("config_name", "default")): entry for entry in _mappings(card.get("configs"))}
    if len(entries) == 1:
        return next(iter(entries))
    marked = [name for name, entry in entries.items() if entry.get("default") is True or name == "default"]
    return marked[0] if marked else None


def class_features(card: Card, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The columns that the card lists classes of, as in the metadata of a parquet file.

    `parts` are the folders of that file: they choose among configurations that list different classes.
    """
    by_config = {
        str(info.get("config_name", "")): _features(info) for info in _mappings(card.get("dataset_info"))
    }
    chosen = [features for name, features in by_config.items() if name in parts] or list(by_config.values())
    return chosen[0] if chosen and all(features == chosen[0] for features in chosen) else {}


def _features(info: Card) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for feature in _mappings(info.get("features")):
        dtype = feature.get("dtype")
        label = dtype.get("class_label") if isinstance(dtype, dict) else None
        names = label.get("names") if isinstance(label, dict) else None
        if isinstance(names, dict):
            numbered = {str(number): str(name) for number, name in names.items()}
            names = [numbered.get(str(number)) for number in range(len(numbered))]
        if isinstance(names, list) and None not in names:
            found[str(feature.get("name"))] = {"_type": "ClassLabel", "names": names}
    return found


def _data_files(files: Any) -> Iterator[DataFiles]:
    """`path`, [`path`, …], or [{split: …, path: `path` or [`path`, …]}, …]."""
    for entry in _listed(files):
        if isinstance(entry, dict):
            paths = [path for path in _listed(entry.get("path")) if isinstance(path, str)]
            yield from (DataFiles(str(entry.get("split", "train")), path) for path in paths)
        elif isinstance(entry, str):
            yield DataFiles(None, entry)


def _mappings(value: Any) -> list[Card]:
    return [cast(Card, entry) for entry in _listed(value) if isinstance(entry, dict)]


def _listed(value: Any) -> Iterable[Any]:
    return cast(list[Any], value) if isinstance(value, list) else [] if value is None else [value]
