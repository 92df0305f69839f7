"""Which tars a URI means: all below a prefix, or those of a pattern."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.store import ObjectInfo, Store

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
MAX_EXPANDED = 1_000_000


@dataclass(frozen=True)
class Location:
    """A data set's URI, split into the store that holds it and the pattern of its shards, if it has one."""

    uri: str
    root: str
    pattern: str | None

    @classmethod
    def of(cls, uri: str) -> Location:
        """`s3://b/set` is every tar below it; `s3://b/set/train-{000..099}.tar` and `…/*.tar` are
        patterns.
        """
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
        """Key of the index. A pattern has its own, so that train and validation tars may share a
        directory.
        """
        if self.pattern is None:
            return "index.json"
        return f"index-{hashlib.sha256(self.pattern.encode()).hexdigest()[:16]}.json"

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Names that the pattern writes out and that are not among `keys`."""
        if self.pattern is None:
            return []
        return sorted({name for name in expand(self.pattern) if _no_glob(name)}.difference(keys))

    def shard_objects(self, store: Store) -> Iterator[ObjectInfo]:
        """The shards there are now, sorted by key."""
        if self.pattern is None:
            yield from (info for info in store.list() if info.key.endswith(SUFFIXES))
            return
        names = expand(self.pattern)
        plain = {name for name in names if _no_glob(name)}
        globs = [re.compile(fnmatch.translate(name)) for name in names if name not in plain]
        fixed = re.split(r"[{*?\[]", self.pattern, maxsplit=1)[0]
        for info in store.list(fixed):
            if info.key in plain or any(glob.fullmatch(info.key) for glob in globs):
                yield info


def _no_glob(name: str) -> bool:
    return not set(name) & set("*?[")


def expand(pattern: str) -> list[str]:
    """`a-{00..02}.{x,y}` written out; numbers keep their width. Raises UserError beyond a million names."""
    if _num_expanded(pattern) > MAX_EXPANDED:
        raise UserError(f"{pattern}: stands for more than {MAX_EXPANDED:,} names; use a wildcard")
    return list(_expanded(pattern))


def _num_expanded(pattern: str) -> int:
    """How many names a pattern stands for, without writing them out; no more exact than MAX_EXPANDED needs."""
    total = 1
    while total <= MAX_EXPANDED and (match := _RANGE.search(pattern) or _CHOICE.search(pattern)):
        options = max(0, int(match[2]) - int(match[1]) + 1) if match.re is _RANGE else match[1].count(",") + 1
        total *= options
        pattern = f"{pattern[: match.start()]}-{pattern[match.end() :]}"
    return total


def _expanded(pattern: str) -> Iterator[str]:
    match = _RANGE.search(pattern) or _CHOICE.search(pattern)
    if match is None:
        yield pattern
        return
    options: Iterable[str] = match[1].split(",")
    if match.re is _RANGE:
        low, high = match[1], match[2]
        options = (str(n).zfill(len(low)) for n in range(int(low), int(high) + 1))
    for option in options:
        yield from _expanded(pattern[: match.start()] + option + pattern[match.end() :])
