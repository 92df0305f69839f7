"""Converts raw labels (numbers, names, one-hot lists, nothing) to class numbers from 0."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ddpm_pipeline.config.bounds import MAX_CLASSES
from ddpm_pipeline.errors import UserError

MAX_NAME = 200
"""Longest class name in characters; longer texts are captions."""
FIELDS = (
    "label", "labels", "class", "cls", "class_id", "classid", "class_idx", "target", "targets", "category",
    "category_id", "digit", "y", "fine_label", "coarse_label", "label_id", "label_idx", "class_label",
    "class_name", "classname", "label_name", "image_label", "species", "breed",
)  # fmt: skip
"""Field names that are recognized as the class in parquet, JSON and metadata files."""

_NUMBER = re.compile(r"-?[0-9]{1,20}(\.0+)?")

Labels = tuple[list[int], tuple[str, ...] | None]
"""The class number of each image (-1 for all without labels), and the class names, if any."""


def is_label_field(field: str) -> bool:
    """Whether the last part of a dotted name is one of FIELDS."""
    return field.rpartition(".")[2].lower() in FIELDS


def choose_field(
    wanted: str | None, candidates: Iterable[str], fields: Iterable[str], where: str
) -> str | None:
    """The field that holds the class: the requested one, else `label`, else the only candidate; None without
    candidates.

    Raises UserError when the requested field is missing, and for several candidates.
    """
    available = sorted(set(fields))
    if wanted is not None:
        if wanted not in available:
            raise UserError(
                f"label_column: {where} has no {wanted!r}; it has: {', '.join(available[:50]) or 'none'}"
            )
        return wanted
    found = sorted(set(candidates))
    plain = [name for name in found if name.lower() == "label"]
    outer = plain or [name for name in found if "." not in name] or found
    if len(outer) > 1:
        raise UserError(
            f"source: {where}: each of {', '.join(outer[:20])} could be the class; "
            "set label_column to one of them, or labels=none"
        )
    return outer[0] if outer else None


def flatten(content: Any, depth: int = 4) -> dict[str, Any]:
    """The leaves of nested mappings under dotted names: {"a": {"b": 1}} gives {"a.b": 1}."""
    if not isinstance(content, dict):
        return {}
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and depth > 1:
            found |= {f"{name}.{inner}": leaf for inner, leaf in flatten(value, depth - 1).items()}
        else:
            found[str(name)] = value
    return found


def to_class_numbers(
    values: Sequence[Any],
    images: Sequence[str],
    where: str,
    names: tuple[str, ...] | None = None,
    field_chosen: bool = False,
) -> Labels:
    """Class numbers of raw labels. `names` are the class names by number, if the source has them.

    Numbers are kept; texts of digits are numbers; other texts are names, numbered in sorted order. A missing label is
    None, NaN, -1 or an empty text. `field_chosen` means that the user chose the field: many different texts are then
    accepted. Raises UserError, naming an image, for labels missing on only some images, and for invalid classes.
    """
    plain = [_normalize(value, image, where) for value, image in zip(values, images, strict=True)]
    missing = plain.count(None)
    if missing == len(plain):
        return [-1] * len(plain), None
    if missing:
        raise UserError(
            f"source: {where}: {missing} of {len(plain)} images have no label "
            f"({images[plain.index(None)]}); label or remove them, or set labels=none"
        )
    texts = {value for value in plain if isinstance(value, str)}
    if not texts:
        numbers = [value for value in plain if isinstance(value, int)]
        _require_in_range(numbers, images, where, names)
        return numbers, names
    if names is not None and texts <= set(names):
        by_name = {name: number for number, name in enumerate(names)}
        if all(isinstance(value, str) for value in plain):
            return [by_name[str(value)] for value in plain], names
    number_at = next((i for i, value in enumerate(plain) if not isinstance(value, str)), None)
    if number_at is not None:
        raise UserError(
            f"source: {where}: some labels are numbers ({images[number_at]}: {plain[number_at]}) and some are names "
            f"({min(texts)!r}); write all in one way, or set labels=none"
        )
    _require_classes(texts, len(plain), where, field_chosen)
    classes = sort_class_names(texts)
    number = {name: i for i, name in enumerate(classes)}
    return [number[str(value)] for value in plain], classes


def sort_class_names(names: Iterable[str]) -> tuple[str, ...]:
    """Class names in the order of their numbers: by value if all are numbers, else alphabetically."""
    found = set(names)
    if all(name.isascii() and name.isdigit() for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def describe_classes(how: str, classes: tuple[str, ...] | None, numbers: Sequence[int]) -> str:
    """A line on the classes, such as `labels from class folders: 0 cat, 1 dog`."""
    if classes is None:
        seen = sorted(set(numbers))
        listed = ", ".join(map(str, seen[:10])) + (f" … {seen[-1]}" if len(seen) > 10 else "")
        return f"labels from {how}: the numbers {listed}"
    listed = ", ".join(f"{i} {name}" for i, name in enumerate(classes[:10]))
    more = f" … {len(classes) - 1} {classes[-1]}" if len(classes) > 10 else ""
    return f"labels from {how}: {listed}{more}"


def _normalize(value: Any, image: str, where: str) -> int | str | None:
    """A raw label as a number, a name, or None if missing."""
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    if isinstance(value, (list, tuple)):
        value = _from_list(list(value), image, where)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if not value.is_integer():
            raise UserError(f"source: {where}: {image} has the label {value!r}; a class is a whole number")
        value = int(value)
    if isinstance(value, str):
        text = value.strip()
        if _NUMBER.fullmatch(text):
            value = int(text.partition(".")[0])
        elif len(text) > MAX_NAME:
            raise UserError(
                f"source: {where}: {image} has the label {text[:40]!r}… of {len(text)} characters; "
                "that is a caption: name the class with label_column, or set labels=none"
            )
        else:
            return text or None
    if value is None or value == -1:
        return None
    if not isinstance(value, int) or value < 0:
        raise UserError(
            f"source: {where}: {image} has the label {str(value)[:80]!r}; a class is a number from 0 or a name"
        )
    return int(value)


def _from_list(value: list[Any], image: str, where: str) -> Any:
    """The label in a list: its only entry, or the index of the 1 in a one-hot list."""
    if len(value) == 1:
        return value[0]
    if len(value) > 1 and all(v in (0, 1) for v in value) and sum(map(int, value)) == 1:
        return [int(v) for v in value].index(1)
    raise UserError(
        f"source: {where}: {image} has the label {str(value)[:80]}; one class an image is expected: "
        "name another with label_column, or set labels=none"
    )


def _require_in_range(
    numbers: list[int], images: Sequence[str], where: str, names: tuple[str, ...] | None
) -> None:
    largest = max(numbers)
    limit = MAX_CLASSES if names is None else len(names)
    if largest >= limit:
        said = "the limit is" if names is None else "the names given are"
        raise UserError(
            f"source: {where}: {images[numbers.index(largest)]} has the label {largest}; {said} {limit}; "
            "name another with label_column, or set labels=none"
        )


def _require_classes(texts: set[str], count: int, where: str, field_chosen: bool) -> None:
    if len(texts) > MAX_CLASSES or (not field_chosen and count >= 50 and len(texts) > count // 2):
        raise UserError(
            f"source: {where}: the labels have {len(texts)} different texts among {count} images, as captions "
            "do; name the class with label_column, or set labels=none"
        )
