"""Interprets the folders of images: wrapping folders, splits, buckets of numbered files, or classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath

from ddpm_pipeline.data.packing.labels import sort_class_names
from ddpm_pipeline.errors import UserError

_SPLIT_WORDS = {
    "train": "train training trn",
    "validation": "val valid validation dev",
    "test": "test testing tst eval evaluation",
    "unlabelled": "unlabelled unlabeled",
    "extra": "extra",
}
_SPLIT_OF = {word: split for split, words in _SPLIT_WORDS.items() for word in words.split()}


def split_word(name: str) -> str | None:
    """The split that a file or folder is named after (`train-00000-of-00002`, `ILSVRC2012_val`), or None."""
    found = {_SPLIT_OF[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_OF}
    return found.pop() if len(found) == 1 else None


def choose_split(words: Sequence[str | None], wanted: str | None, where: str) -> list[int]:
    """Numbers of the entries of the wanted split. `words` holds the split of each entry, None if its name has none.

    Raises UserError when there are several and none is requested, and when the requested one is missing.
    """
    counts = {word: words.count(word) for word in sorted({word for word in words if word is not None})}
    if wanted == "all" or (wanted is None and len(counts) < 2):
        return list(range(len(words)))
    listed = ", ".join(f"{word} ({count})" for word, count in counts.items())
    if wanted is None:
        raise UserError(
            f"source: {where} holds the splits {listed}; set split=NAME to pack one of them, or split=all"
        )
    name = _SPLIT_OF.get(wanted, wanted)
    if name not in counts:
        raise UserError(f"split: {where} holds no split {wanted!r} (found: {listed or 'none'})")
    return [i for i, word in enumerate(words) if word == name]


@dataclass(frozen=True)
class FolderLayout:
    """The images of the data set, and their paths below wrapping and split folders."""

    kept: list[int]
    parts: list[tuple[str, ...]]
    """For each kept image: the remaining folders, and the file name."""
    wraps: list[str]
    """Folders that contain all images."""


def interpret_folders(paths: Sequence[str], labels: str, split: str | None, where: str) -> FolderLayout:
    """The images of the requested split, and the rest of their paths.

    Folders that wrap everything mean nothing, `train` and `test` are splits; with labels=folder whatever folder
    comes first is the class. Raises UserError when there are splits and none was chosen.
    """
    kept = list(range(len(paths)))
    least = 2 if labels == "folder" else 1
    parts, wraps = _unwrap([PurePosixPath(path).parts for path in paths], least if split is None else 1)
    if labels == "folder" and split is None:
        return FolderLayout(kept, parts, wraps)
    while (words := _split_level(parts)) is not None:
        chosen = choose_split(words, split, where)
        kept, parts = [kept[i] for i in chosen], [parts[i][1:] for i in chosen]
        if split == "all":
            return FolderLayout(kept, parts, wraps)
        split = None
        parts, more = _unwrap(parts, least)
        wraps += more
    if split not in (None, "all"):
        choose_split([next((word for wrap in wraps if (word := split_word(wrap))), None)], split, where)
    return FolderLayout(kept, parts, wraps)


def class_folders(layout: FolderLayout, labels: str, where: str) -> tuple[list[str] | None, tuple[str, ...]]:
    """The class folder of each image, None when folders name no classes; and what might have been meant otherwise.

    Buckets of numbered files are not classes, unless labels=folder. Raises UserError when some images lie outside.
    """
    parts = layout.parts
    loose = [len(p) == 1 for p in parts]
    if all(loose):
        if labels == "folder":
            raise UserError(f"labels: {where} has no class folders; set labels=auto or none")
        return None, tuple(f"one folder holds all images ({w}): it is no class" for w in layout.wraps[-1:])
    if any(loose):
        raise UserError(
            f"source: {where} holds images both in class folders and outside "
            f"({parts[loose.index(True)][0]}); move the loose ones, or set labels=none"
        )
    if labels == "auto" and _are_buckets(parts):
        tops = sort_class_names(p[0] for p in parts)
        return None, (
            f"folders {tops[0]} … {tops[-1]} are buckets of files, no classes; if they are, set labels=folder",
        )
    return [p[0] for p in parts], ()


def _unwrap(parts: list[tuple[str, ...]], least: int) -> tuple[list[tuple[str, ...]], list[str]]:
    """The paths without the folders that hold all of them; `least` parts of each path are left."""
    wraps: list[str] = []
    while parts and all(len(p) > least for p in parts) and len({p[0] for p in parts}) == 1:
        wraps.append(parts[0][0])
        parts = [p[1:] for p in parts]
    return parts, wraps


def _split_level(parts: list[tuple[str, ...]]) -> list[str | None] | None:
    """The split of each image, if the first folders are splits: two at least, and no fewer than other folders."""
    tops = {p[0] for p in parts if len(p) > 1}
    words = {top: split_word(top) for top in tops}
    named = [word for word in words.values() if word is not None]
    if len(set(named)) < 2 or 2 * len(named) < len(tops) or any(len(p) == 1 for p in parts):
        return None
    return [words[p[0]] for p in parts]


def _are_buckets(parts: list[tuple[str, ...]]) -> bool:
    """Whether folders only spread the files: named by numbers that count on through the files (FFHQ, EDM,
    img2dataset), by thousands, or by the first characters of each file's name.
    """
    tops = {p[0] for p in parts}
    width = {len(top) for top in tops}
    if len(width) != 1:
        return False
    stems = [(p[0], PurePosixPath(p[-1]).stem.lower()) for p in parts]
    hexes = all(re.fullmatch(r"[0-9a-f]{2,}", top.lower()) for top in tops)
    if hexes and all(len(s) > len(t) and s.startswith(t.lower()) and _HEX.fullmatch(s) for t, s in stems):
        return True
    if min(width) < 3 or not all(top.isascii() and top.isdigit() for top in tops):
        return False
    if len(tops) > 1 and all(int(top) % 1000 == 0 for top in tops):
        return True
    ranges: dict[str, tuple[int, int]] = {}
    for top, stem in stems:
        digits = re.findall(r"\d{1,18}", stem)
        if not digits:
            return False
        number = int(digits[-1])
        low, high = ranges.get(top, (number, number))
        ranges[top] = (min(low, number), max(high, number))
    ordered = [ranges[top] for top in sorted(ranges)]
    return all(a[1] < b[0] for a, b in pairwise(ordered))


_HEX = re.compile(r"[0-9a-f]+")
