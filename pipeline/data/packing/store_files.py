"""Image files under an s3:// prefix as a source: listed once, read one by one as they are needed."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import PurePosixPath

from ddpm_pipeline.data.packing.source_files import (
    MAX_FILE_BYTES,
    FileName,
    Files,
    clean_name,
    is_counted_hidden,
    is_hidden,
)
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import ObjectInfo, open_store


@lru_cache(maxsize=1)
def list_objects(uri: str) -> tuple[ObjectInfo, ...]:
    """The objects under a prefix, listed once for a pack; `list_objects.cache_clear()` begins another.

    Raises UserError for a prefix without objects.
    """
    store = open_store(uri)
    store.require_container()
    found = tuple(store.list())
    if not found:
        raise UserError(f"source: {uri}: there are no objects under this prefix; check the name")
    return found


class StoreFiles(Files):
    """The objects under a prefix, each in the version that was listed."""

    wrapped = False

    def __init__(self, uri: str) -> None:
        self.where, self.left_out = uri, Counter()
        self._store = open_store(uri)
        found: dict[str, ObjectInfo] = {}
        for info in list_objects(uri):
            name = clean_name(info.key, uri)
            parts = PurePosixPath(name).parts
            if any(map(is_hidden, parts)):
                self.left_out["hidden"] += is_counted_hidden(parts[-1])
            elif name in found:
                raise UserError(
                    f"source: {uri}: {name} occurs twice, as {found[name].key} and {info.key}; keep one"
                )
            else:
                found[name] = info
        self.names = [FileName("", name) for name in sorted(found)]
        self._infos = [found[name] for name in sorted(found)]

    def read(self, number: int) -> bytes:
        info = self._infos[number]
        if info.size_bytes > MAX_FILE_BYTES:
            raise OSError(f"it has {info.size_bytes} bytes; the limit is {MAX_FILE_BYTES}")
        return self._store.read_range(info.key, 0, info.size_bytes, etag=info.etag or None)
