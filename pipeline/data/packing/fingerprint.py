"""Detects, without reading images, whether a source has changed since it was packed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ddpm_pipeline.config.data import PLUGIN_SOURCE, PackConfig
from ddpm_pipeline.data.packing.open_source import source_paths
from ddpm_pipeline.data.packing.remote_source import is_in_s3
from ddpm_pipeline.data.packing.store_files import list_objects

FORMAT_VERSION = 2
"""Increase it when this program packs the same files differently: every source is then read again."""
_IRRELEVANT = {"source", "dest", "num_threads", "fetch_bytes", "fetch_dir"}
"""Settings that change neither what is packed nor what is refused."""


def fingerprint(config: PackConfig) -> str:
    """SHA-256 over the settings and the names, sizes and times (in S3: tags) of the source's files.

    Raises UserError for a missing source.
    """
    settings = config.model_dump(mode="json", exclude=_IRRELEVANT)
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, settings], sort_keys=True).encode())
    for line in _lines(config.source):
        digest.update(line)
    return digest.hexdigest()


def _lines(source: str) -> Iterator[bytes]:
    if source == "digits" or source.startswith(PLUGIN_SOURCE):
        return  # a plug-in's identity and settings are among the settings
    if is_in_s3(source):
        for info in list_objects(source):
            yield b"%s\0%d %s\n" % (os.fsencode(info.key), info.size_bytes, info.etag.encode())
        return
    for path in source_paths(source):
        yield from sorted(_files(path))


def _files(path: Path) -> Iterator[bytes]:
    if path.is_file():
        yield _line(path.name, path.stat())
        return
    seen: set[tuple[int, int]] = set()  # a link may point to a parent folder
    for folder, below, names in os.walk(path, followlinks=True):
        found = os.stat(folder)
        if (found.st_dev, found.st_ino) in seen:
            below.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        for name in names:
            file = os.path.join(folder, name)
            yield _line(os.path.relpath(file, path), os.lstat(file))
            if os.path.islink(file) and os.path.exists(file):
                yield _line(os.path.relpath(file, path), os.stat(file))


def _line(name: str, found: os.stat_result) -> bytes:
    return b"%s\0%d %d\n" % (os.fsencode(name), found.st_size, found.st_mtime_ns)
