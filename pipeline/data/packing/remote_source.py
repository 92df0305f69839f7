"""Sources elsewhere: s3://, http(s)://, hf://, well-known names. Image files in S3 are read there, others fetched."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.location import Location, expand, require_matches
from ddpm_pipeline.data.packing.archives import TARS
from ddpm_pipeline.data.packing.fetch import Entry, FetchedFile, FileVersion, RemoteFile
from ddpm_pipeline.data.packing.folder_layout import split_word
from ddpm_pipeline.data.packing.hugging_face import HubDataset, select_files
from ddpm_pipeline.data.packing.known_datasets import DEFAULT_SPLIT, KNOWN_DATASETS, KnownRemote
from ddpm_pipeline.data.packing.store_files import list_objects
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.private_files import cache_folder
from ddpm_pipeline.progress import Progress, no_progress
from ddpm_pipeline.store import ObjectInfo, Store, open_store
from ddpm_pipeline.store.web_file import WebFile, WebFileInfo, without_secrets

SCHEMES = ("s3", "http", "https", "hf")
ARCHIVES = (*TARS, ".zip", ".parquet", ".npz")
_MAX_NAMED = 5


@dataclass(frozen=True)
class LocalSource:
    """Settings whose source this machine can read."""

    config: PackConfig
    notes: tuple[str, ...] = ()
    """What was fetched for it."""


@dataclass(frozen=True)
class _Plan:
    """What is to be fetched for a source."""

    remotes: Sequence[RemoteFile]
    entry: str
    """Name of its folder in the cache."""
    is_folder: bool = False
    """Whether the source is the folder, also of a single file."""
    is_mirror: bool = True
    """Whether other files in the folder are removed: nobody puts files there."""
    split: str | None = None
    """The split to pack, where the files of another one are not fetched."""
    notes: tuple[str, ...] = ()


def is_remote(source: str) -> bool:
    """Whether a source is not a path of this machine. A path named like a well-known data set is a path."""
    known = source in KNOWN_DATASETS or ("://" in source and source.partition("://")[0].lower() in SCHEMES)
    return known and not Path(source).exists()


def is_in_s3(source: str) -> bool:
    """Whether a source lies in S3."""
    return source.lower().startswith("s3://")


def fetch_source(config: PackConfig, progress: Progress = no_progress) -> LocalSource:
    """The settings with what the source names on this machine: fetched, if need be. Progress counts bytes.

    Of a well-known data set, the training split unless another is chosen. Image files under an s3:// prefix stay where
    they are. Raises UserError for a source that is not there, is not readable by its kind, or exceeds `fetch_bytes`;
    StoreUnreachable when a server does not answer.
    """
    if not is_remote(config.source):
        return LocalSource(config)
    plan = _plan(config)
    if plan is None:
        return LocalSource(config)
    entry = Entry(fetch_folder(config), plan.entry)
    fetched = entry.fetch(plan.remotes, config.fetch_bytes, progress, mirror=plan.is_mirror)
    alone = plan.remotes[0].name if len(plan.remotes) == 1 and not plan.is_folder else ""
    changes = {"source": str(entry.folder / alone)} | ({"split": plan.split} if plan.split else {})
    return LocalSource(config.model_copy(update=changes), (*plan.notes, *_notes(plan.remotes, fetched)))


def describe_remote(config: PackConfig) -> str:
    """What is to be fetched of a remote source, found without fetching it. Raises as `fetch_source` does."""
    plan = _plan(config)
    if plan is None:
        objects = list_objects(config.source)
        return f"{len(objects):,} objects, {sum(info.size_bytes for info in objects):,} bytes, read where they are"
    folder = fetch_folder(config) / plan.entry
    missing = [
        remote for remote in plan.remotes if remote.sha256 is None or not (folder / remote.name).exists()
    ]
    if not missing:
        return f"in {folder}"
    sizes = [remote.stat().size_bytes for remote in missing]
    known = sum(size or 0 for size in sizes)
    return f"{len(sizes):,} files, {known:,} bytes{' or more' if None in sizes else ''}, to be fetched"


def fetch_folder(config: PackConfig) -> Path:
    """Where fetched files are kept."""
    return Path(config.fetch_dir).expanduser() if config.fetch_dir else cache_folder("sources")


def _plan(config: PackConfig) -> _Plan | None:
    """What to fetch; None for image files in S3."""
    list_objects.cache_clear()
    if config.source in KNOWN_DATASETS:
        return _plan_known(config)
    if is_in_s3(config.source):
        return _plan_s3(config)
    if config.source.lower().startswith("hf:"):
        return _plan_hub(config)
    remotes = [HttpFile(url) for url in expand(config.source)]
    _require_distinct([remote.name for remote in remotes], config.source)
    if len(remotes) == 1:
        _require_archive(remotes[0].name, remotes[0].where)
    return _Plan(remotes, _entry_name(config.source))


def _plan_known(config: PackConfig) -> _Plan:
    name, dataset = config.source, KNOWN_DATASETS[config.source]
    split = split_word(config.split or DEFAULT_SPLIT) or str(config.split)
    folder = fetch_folder(config) / name
    remotes = [KnownRemote(name, file, folder) for file in dataset.files_of(split)]
    if not remotes or split not in ("all", *dataset.splits):
        raise UserError(f"split: {dataset.title} has the splits {', '.join(dataset.splits)}, not {split!r}")
    return _Plan(remotes, name, is_folder=len(dataset.files) > 1, is_mirror=False, split=split)


def _plan_hub(config: PackConfig) -> _Plan:
    dataset = HubDataset(config.source)
    remotes, note = select_files(dataset, config)
    entry = _entry_name(f"hf://{dataset.repository.replace('/', '--')}/{config.source}@{dataset.commit}")
    # The split was chosen by what the card says, and names of files may not repeat it.
    return _Plan(remotes, entry, is_folder=True, split="all", notes=(note,))


def _plan_s3(config: PackConfig) -> _Plan | None:
    source = config.source
    if source.lower().endswith(ARCHIVES) or set(source) & set("*?{"):
        return _plan_s3_archives(source)
    store, objects = open_store(source), list_objects(source)
    total = sum(info.size_bytes for info in objects)
    if not any(info.key.lower().endswith(ARCHIVES) for info in objects):
        if total > config.fetch_bytes:
            raise UserError(
                f"fetch_bytes: {source} has {total:,} bytes, and {config.fetch_bytes:,} are allowed; raise fetch_bytes"
            )
        return None
    return _Plan([S3File(store, info) for info in objects], _entry_name(source), is_folder=True)


def _plan_s3_archives(source: str) -> _Plan:
    """One archive, or those that a pattern names."""
    root, _, name = source.rpartition("/")
    location = Location.of(source) if set(source) & set("*?{") else Location(source, root, name)
    store = open_store(location.root)
    store.require_container()
    objects = sorted(location.shard_objects(store), key=lambda info: info.key)
    require_matches(f"source: {source}", location.missing(info.key for info in objects))
    return _Plan([S3File(store, info) for info in objects], _entry_name(source))


class S3File(RemoteFile):
    """An object, in the version that was listed."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        self.name, self.where = info.key, f"{store.uri}/{info.key}"
        self._store, self._info = store, info

    def stat(self) -> FileVersion:
        return FileVersion(size_bytes=self._info.size_bytes, tag=self._info.etag)

    def open(self, start: int, version: FileVersion) -> BinaryIO:
        return self._store.open(self._info.key, start=start, etag=version.tag or None)


class HttpFile(RemoteFile):
    """A file at an http(s) address. Its server is asked at once, for a name and version."""

    def __init__(self, url: str) -> None:
        """Raises UserError for an address without a file."""
        self._file = WebFile(url)
        self.where = self._file.where
        self._info: WebFileInfo | None = self._file.stat()
        names = [name for name in self._info.names if _is_plain(name)]
        known = [name for name in names if name.lower().endswith(ARCHIVES)]
        if not names:
            raise UserError(f"source: {self.where}: names no file; give the address of an archive")
        self.name = (known or names)[0]

    def stat(self) -> FileVersion:
        self._info = info = self._info or self._file.stat()
        return FileVersion(size_bytes=info.size_bytes, tag=info.tag)

    def open(self, start: int, version: FileVersion) -> io.RawIOBase:
        self._info = None  # if this version is gone, the next question is for the new one
        return self._file.open(start, WebFileInfo(version.size_bytes, version.tag, ()))


def _is_plain(name: str) -> bool:
    """Whether a name from a server may be that of a file here."""
    return re.fullmatch(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,199}", name) is not None


def _require_archive(name: str, where: str) -> None:
    if not name.lower().endswith(ARCHIVES):
        raise UserError(
            f"source: {where}: {name} is of an unknown kind; give the address of an archive ({' '.join(ARCHIVES)})"
        )


def _require_distinct(names: Sequence[str], source: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"source: {without_secrets(source)}: names {twice} twice; fetch them to a folder yourself"
        )


def _entry_name(source: str) -> str:
    """Readable, and different for every source; a query may be a secret, and is part of the hash only."""
    host = re.sub(
        r"[^a-z0-9.-]", "-", source.partition("://")[2].partition("/")[0].rpartition("@")[2].lower()
    )
    return f"{host.lstrip('.')[:60]}-{hashlib.sha256(source.encode()).hexdigest()[:16]}"


def _notes(remotes: Sequence[RemoteFile], fetched: Sequence[FetchedFile]) -> tuple[str, ...]:
    named = [
        f"fetched {remote.where}: {file.size_bytes:,} bytes, SHA-256 {file.sha256}"
        for remote, file in list(zip(remotes, fetched, strict=True))[:_MAX_NAMED]
    ]
    more = len(fetched) - len(named)
    return (*named, *([f"fetched {more:,} more files"] if more else []))
