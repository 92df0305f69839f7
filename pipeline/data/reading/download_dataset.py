"""Downloading a data set to a local folder, checked against its index while it is written.

A file that is present with the right size and hash is not fetched again, and the index is written last, so the same
command resumes after an interruption. Downloading a generation uses `Download` too.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

from ddpm_pipeline.data.index import (
    DATASET_CARD_KEY,
    MEMBER,
    PACK_REPORT_KEY,
    Index,
    ShardEntry,
    index_document,
    load_index,
    read_table,
)
from ddpm_pipeline.data.location import SUFFIXES
from ddpm_pipeline.data.reading.unpack import ImageFolder, indexed_images
from ddpm_pipeline.errors import DamageError, DiskFull, UserError
from ddpm_pipeline.parallel import thread_map
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.store import FileStore, ObjectMissing, Store, open_store
from ddpm_pipeline.store.download_folder import Folder

T = TypeVar("T")
MAX_CONCURRENT = 8
CHUNK_BYTES = 256 << 10
"""After each chunk a thread checks whether the download was cancelled."""
_MAX_LISTED = 5


@dataclass(frozen=True)
class RemoteObject:
    """An object to download whose size and hash are known."""

    key: str
    size_bytes: int
    sha256: str
    etag: str | None = None
    """The tag it must have, if that is known."""


class _Cancelled(Exception):  # noqa: N818 - an outcome, not an error
    """The download ends before this shard is complete."""


@dataclass
class Download:
    """Downloads objects of one store to a folder, several at a time. `progress` counts bytes."""

    store: Store
    folder: Folder
    total_bytes: int
    progress: Progress
    fetched: int = 0
    """Number of shards downloaded."""
    present: int = 0
    """Number of shards that were already present."""
    images: ImageFolder | None = None
    """Where images are unpacked to, if requested."""
    _done_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def process_all(self, work: Callable[[T], None], items: Iterable[T], remedy: str) -> None:
        """Call `work` on all items. After the rest is done, DamageError lists the damaged and missing ones."""

        def problem(item: T) -> str | None:
            try:
                work(item)
            except (DamageError, ObjectMissing) as error:
                return str(error)
            except _Cancelled:
                return None  # the item that failed raises
            except BaseException:
                self._cancelled.set()  # so that other threads stop in the middle of their shards
                raise
            return None

        require_disk_space(self.folder, self.total_bytes)
        self._report(0)
        listed: list[str] = []
        count = 0
        for message in thread_map(MAX_CONCURRENT, self._cancelled)(problem, items):
            if message is not None:
                count += 1
                listed += [message] if len(listed) < _MAX_LISTED else []
        if count:
            more = f" (and {count - len(listed):,} more)" if count > len(listed) else ""
            raise DamageError(f"{'; '.join(listed)}{more}; everything else was downloaded; {remedy}")

    def download(self, remote: RemoteObject) -> None:
        """Fetch a shard unless it is present. A wrong hash is retried once, in case the transfer was at fault."""
        if self._is_present(remote):
            self._report(remote.size_bytes, present=1)
            return
        try:
            self._fetch(remote)
        except DamageError:
            self._fetch(remote)
        self._report(0, fetched=1)

    def copy_document(self, key: str) -> None:
        """Copy a small object in its current state, if it exists."""
        try:
            self.folder.put(key, self.store.read(key))
        except ObjectMissing:
            return

    def _is_present(self, remote: RemoteObject) -> bool:
        file = self.folder.open(remote.key)
        if file is None:
            return False
        with file:
            if file.seek(0, 2) != remote.size_bytes:
                return False
            file.seek(0)
            sha256 = hashlib.sha256()
            while chunk := file.read(CHUNK_BYTES):
                sha256.update(chunk)
                self._check_cancelled()
        return sha256.hexdigest() == remote.sha256

    def _check_cancelled(self) -> None:
        """Raise _Cancelled once the download is cancelled."""
        if self._cancelled.is_set():
            raise _Cancelled

    def _fetch(self, remote: RemoteObject) -> None:
        size, sha256 = 0, hashlib.sha256()
        try:
            with (
                self.store.open(remote.key, etag=remote.etag) as stream,
                self.folder.new(remote.key) as file,
            ):
                while size <= remote.size_bytes and (chunk := stream.read(CHUNK_BYTES)):
                    file.write(chunk)
                    sha256.update(chunk)
                    size += len(chunk)
                    self._report(len(chunk))
                    self._check_cancelled()
                if (size, sha256.hexdigest()) != (remote.size_bytes, remote.sha256):
                    raise DamageError(
                        f"{self.store.uri}/{remote.key}: is damaged: its size or SHA-256 differs from the record"
                    )
        except BaseException:
            self._report(-size)
            raise

    def _report(self, more_bytes: int, fetched: int = 0, present: int = 0) -> None:
        with self._lock:
            self._done_bytes += more_bytes
            self.fetched += fetched
            self.present += present
            self.progress(self._done_bytes, self.total_bytes)


def require_disk_space(folder: Folder, total_bytes: int) -> None:
    """Raise DiskFull, before anything is fetched, when the missing bytes do not fit."""
    free = shutil.disk_usage(folder.root).free
    present = sum(path.lstat().st_size for path in folder.root.rglob("*") if path.name.endswith(SUFFIXES))
    if total_bytes - present > free:
        raise DiskFull(
            f"{folder.root}: {total_bytes - present:,} bytes to download and {free:,} free; free disk space, "
            "or choose another folder"
        )


def local_folder(place: str, store: Store) -> Path:
    """The local folder that a user names. UserError for a URI of a store, and for a folder inside the source."""
    target = open_store(place)
    if not isinstance(target, FileStore):
        raise UserError(f"{place}: not a local folder; name one, such as ./samples")
    root = target.root.resolve()
    if isinstance(store, FileStore) and root.is_relative_to(store.root.resolve()):
        raise UserError(f"{place}: is inside {store.uri}, the source; choose another folder")
    return root


def image_folder(root: Path, what: str, class_names: Iterable[str] | None) -> ImageFolder:
    """The folder for unpacked images, beside that of the shards, which contains nothing but the download."""
    folder = Folder(root.with_name(f"{root.name}-images"))
    folder.claim(f"the images of {what}")
    return ImageFolder(folder, None if class_names is None else tuple(class_names))


def download_dataset(uri: str, place: str, unpack: bool, progress: Progress) -> tuple[Index, Download]:
    """Download an index, its shards and member tables. UserError for a folder that contains anything else."""
    index = load_index(uri)
    root = local_folder(place, index.store)
    _require_distinct(index)
    folder, what = Folder(root), f"the data set {index.digest}"
    folder.claim(what)
    images = image_folder(root, what, index.class_names) if unpack else None
    download = Download(index.store, folder, index.size_bytes, progress, images=images)
    _download_tables(download, index)

    def work(numbered: tuple[int, ShardEntry]) -> None:
        number, entry = numbered
        download.download(RemoteObject(entry.name, entry.size_bytes, entry.sha256, index.tag(entry)))
        if images is not None:
            table = read_table(index, number, FileStore(root))
            for row, extension, label, data in indexed_images(folder.path(entry.name), entry.name, table):
                images.put(label, int(index.starts[number]) + row, extension, data)

    download.process_all(
        work, enumerate(index.shards), f"restore the damaged shards, or run ddpm index {uri} --fresh"
    )
    if index.location.pattern is None:
        download.copy_document(DATASET_CARD_KEY)
        download.copy_document(PACK_REPORT_KEY)
    folder.put(index.name, index_document(index.model_copy(update={"shards_uri": None})))
    return index, download


def _require_distinct(index: Index) -> None:
    names = [shard.name for shard in index.shards]
    if len({*names, index.name, index.tables, DATASET_CARD_KEY, PACK_REPORT_KEY}) != len(names) + 4:
        raise DamageError(f"{index.uri}: {index.name}: two of its objects have the same name; index it again")


def _download_tables(download: Download, index: Index) -> None:
    if _tables_present(download.folder, index):
        return
    with index.index_store.open(index.tables) as stream, download.folder.new(index.tables) as out:
        for data in _checked_tables(index, stream):
            out.write(data)


def _tables_present(folder: Folder, index: Index) -> bool:
    file = folder.open(index.tables)
    if file is None:
        return False
    with file:
        try:
            for _ in _checked_tables(index, file):
                continue
        except DamageError:
            return False
        return not file.read(1)


def _checked_tables(index: Index, stream: BinaryIO) -> Iterator[bytes]:
    """The member tables' object in chunks. DamageError when the rows of a shard differ from the index."""
    yield stream.read(index.tables_offset)
    for entry in index.shards:
        data = stream.read(entry.num_samples * MEMBER.itemsize)
        if hashlib.sha256(data).hexdigest() != entry.table_sha256:
            raise DamageError(
                f"{index.uri}: {index.tables}: the rows of {entry.name} are damaged; run ddpm index {index.uri}"
            )
        yield data
