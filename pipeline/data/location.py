"""The tars that a URI means: all below a prefix, or those that match a pattern."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from braceexpand import braceexpand

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import ObjectInfo, Store

SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_EXPANDED = 1_000_000
MAX_GROUPS = 50
MAX_DIGITS = 100
"""Digits in a range of numbers: Python refuses to parse numbers of thousands of digits."""
_GROUP = re.compile(r"\{([^{}]*)\}")
_STEP = r"(?:\.\.-?\d+)?$"
_RANGE, _LETTERS = re.compile(rf"(-?\d+)\.\.(-?\d+){_STEP}"), re.compile(rf"[A-Za-z]\.\.[A-Za-z]{_STEP}")
_NUM_LETTERS = 52
_MAX_LISTED = 5


@dataclass(frozen=True)
class Location:
    """A data set's URI, split into the root of its store and the pattern of its shards, if it has one."""

    uri: str
    root: str
    pattern: str | None

    @classmethod
    def of(cls, uri: str) -> Location:
        """`s3://b/set` means every tar below it; `s3://b/set/train-{000..099}.tar` and `…/*.tar` are patterns."""
        last = uri.rstrip("/")
        if not any(mark in uri for mark in "{*?") and not last.endswith(SUFFIXES):
            return cls(uri, last, None)
        fixed = re.split(r"[{*?]", last, maxsplit=1)[0]
        root, _, _ = fixed.rpartition("/")
        if not root or root.endswith(":/") or root in ("s3:/", "file:/"):
            raise UserError(f"{uri}: the pattern must come after a bucket or directory and a '/'")
        return cls(uri, root, last[len(root) + 1 :])

    @property
    def index_name(self) -> str:
        """Key of the index. Each pattern has its own, so training and validation tars can share a directory."""
        if self.pattern is None:
            return "index.json"
        return f"index-{hashlib.sha256(self.pattern.encode()).hexdigest()[:16]}.json"

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Names in the expanded pattern that are not in `keys`; names with wildcards must match one of `keys`."""
        if self.pattern is None:
            return []
        keys = list(keys)
        names = set(expand(self.pattern)).difference(keys)
        return sorted(name for name in names if not (is_glob(name) and fnmatch.filter(keys, name)))

    def shard_objects(self, store: Store) -> Iterator[ObjectInfo]:
        """The current shards, sorted by key."""
        if self.pattern is None:
            yield from (info for info in store.list() if info.key.endswith(SUFFIXES))
            return
        names = expand(self.pattern)
        plain = {name for name in names if not is_glob(name)}
        globs = [re.compile(fnmatch.translate(name)) for name in names if name not in plain]
        fixed = re.split(r"[{*?\[]", self.pattern, maxsplit=1)[0]
        for info in store.list(fixed):
            if info.key in plain or any(glob.fullmatch(info.key) for glob in globs):
                yield info


def require_matches(what: str, missing: Sequence[str]) -> None:
    """Raise UserError when names of a pattern are missing; `what` begins the message."""
    if missing:
        named = ", ".join(missing[:_MAX_LISTED]) + (", …" if len(missing) > _MAX_LISTED else "")
        raise UserError(
            f"{what}: {len(missing)} of the files it names are missing: {named}; get them, or name existing ones"
        )


def is_glob(name: str) -> bool:
    """Whether an expanded name still has wildcards."""
    return not set(name).isdisjoint("*?[")


def expand(pattern: str) -> list[str]:
    """Expand braces as webdataset does, in order: `a-{00..02}.{x,y}` gives six names.

    Unmatched braces are part of the name. Raises UserError beyond a million names.
    """
    if _max_names(pattern) > MAX_EXPANDED:
        raise UserError(f"{pattern[:200]}: expands to more than {MAX_EXPANDED:,} names; use a wildcard")
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError:  # unmatched braces
        return [pattern]


def _max_names(pattern: str) -> int:
    """An upper bound on the names a pattern expands to, without expanding it: nested braces multiply."""
    total, groups = 1, 0
    while total <= MAX_EXPANDED and (group := _GROUP.search(pattern)):
        total *= _num_choices(group[1])
        groups += 1
        pattern = f"{pattern[: group.start()]}-{pattern[group.end() :]}"
        if groups > MAX_GROUPS:
            raise UserError(f"{pattern[:200]}: has more than {MAX_GROUPS} pairs of braces; use a wildcard")
    return total


def _num_choices(group: str) -> int:
    """How many choices a pair of braces has at most; a step reduces them."""
    if (numbers := _RANGE.match(group)) is None:
        return _NUM_LETTERS if _LETTERS.match(group) else group.count(",") + 1
    if len(group) > MAX_DIGITS:
        return MAX_EXPANDED + 1
    return abs(int(numbers[2]) - int(numbers[1])) + 1
