"""Bringing a data set to a folder of this machine, checked against its index while it is written.

A file that is there with the right size and hash is not fetched again, and the index is written last, so that the same
command goes on after any interruption. `Download` brings a generation too.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

from pipeline.data.index import (
    DATASET_CARD_KEY,
    MEMBER,
    PACK_REPORT_KEY,
    Index,
    ShardEntry,
    index_document,
    load_index,
    read_table,
)
from pipeline.data.location import SUFFIXES
from pipeline.data.reading.unpack import ImageFolder, indexed_images
from pipeline.errors import DamageError, DiskFull, UserError
from pipeline.parallel import thread_map
from pipeline.store import FileStore, ObjectMissing, Store, open_store
from pipeline.store.download_folder import Folder

T = TypeVar("T")
Progress = Callable[[int, int], None]
MAX_CONCURRENT = 8
CHUNK_BYTES = 256 << 10
"""After so many each thread looks whether the download ends."""
_MAX_LISTED = 5


@dataclass(frozen=True)
class RemoteObject:
    """An object whose bytes are known before they come."""

    key: str
    size_bytes: int
    sha256: str
    etag: str | None = None
    """The tag it must have, where that is known."""


class _Cancelled(Exception):  # noqa: N818 - what happened is the name
    """The download ends before this shard is whole."""


@dataclass
class Download:
    """Objects of one store on their way to a folder, several at a time. `progress` is told of bytes."""

    store: Store
    folder: Folder
    total_bytes: int
    progress: Progress
    fetched: int = 0
    """Shards that were brought."""
    present: int = 0
    """Shards that were there already."""
    images: ImageFolder | None = None
    """Where the images go as files, if they are wanted so."""
    _done_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def process_all(self, work: Callable[[T], None], items: Iterable[T], remedy: str) -> None:
        """`work` on all items. DamageError, after the others are there, names those that are damaged or gone."""

        def problem(item: T) -> str | None:
            try:
                work(item)
            except (DamageError, ObjectMissing) as error:
                return str(error)
            except _Cancelled:
                return None  # the item that failed raises in its turn
            except BaseException:
                self._cancelled.set()  # so that the other threads do not go on to the end of their shards
                raise
            return None

        require_disk_space(self.folder, self.total_bytes)
        self._tell(0)
        found: list[str] = []
        number = 0
        for told in thread_map(MAX_CONCURRENT, self._cancelled)(problem, items):
            if told is not None:
                number += 1
                found += [told] if len(found) < _MAX_LISTED else []
        if number:
            more = f" (and {number - len(found):,} more)" if number > len(found) else ""
            raise DamageError(f"{'; '.join(found)}{more}; the rest is brought; {remedy}")

    def download(self, piece: RemoteObject) -> None:
        """Fetch a shard unless it is there. A wrong hash is tried once more, as the way here may be to blame."""
        if self._is_present(piece):
            self._tell(piece.size_bytes, kept=1)
            return
        try:
            self._fetch(piece)
        except DamageError:
            self._fetch(piece)
        self._tell(0, fetched=1)

    def copy_document(self, key: str) -> None:
        """Copy a small object as it is now, if there is one."""
        try:
            self.folder.put(key, self.store.read(key))
        except ObjectMissing:
            return

    def _is_present(self, piece: RemoteObject) -> bool:
        file = self.folder.open(piece.key)
        if file is None:
            return False
        with file:
            if file.seek(0, 2) != piece.size_bytes:
                return False
            file.seek(0)
            sha256 = hashlib.sha256()
            while chunk := file.read(CHUNK_BYTES):
                sha256.update(chunk)
                self._check_cancelled()
        return sha256.hexdigest() == piece.sha256

    def _check_cancelled(self) -> None:
        """Raise _Ended once the download ends."""
        if self._cancelled.is_set():
            raise _Cancelled

    def _fetch(self, piece: RemoteObject) -> None:
        size, sha256 = 0, hashlib.sha256()
        try:
            with (
                self.store.open(piece.key, etag=piece.etag) as stream,
                self.folder.new(piece.key) as file,
            ):
                while size <= piece.size_bytes and (chunk := stream.read(CHUNK_BYTES)):
                    file.write(chunk)
                    sha256.update(chunk)
                    size += len(chunk)
                    self._tell(len(chunk))
                    self._check_cancelled()
                if (size, sha256.hexdigest()) != (piece.size_bytes, piece.sha256):
                    raise DamageError(
                        f"{self.store.uri}/{piece.key}: is damaged: its size or sha256 is not the recorded one"
                    )
        except BaseException:
            self._tell(-size)
            raise

    def _tell(self, more_bytes: int, fetched: int = 0, kept: int = 0) -> None:
        with self._lock:
            self._done_bytes += more_bytes
            self.fetched += fetched
            self.present += kept
            self.progress(self._done_bytes, self.total_bytes)


def require_disk_space(folder: Folder, total_bytes: int) -> None:
    """Raise DiskFull, before anything is fetched, where what is still to come cannot fit."""
    free = shutil.disk_usage(folder.root).free
    there = sum(path.lstat().st_size for path in folder.root.rglob("*") if path.name.endswith(SUFFIXES))
    if total_bytes - there > free:
        raise DiskFull(
            f"{folder.root}: {total_bytes - there:,} bytes are still to come and {free:,} are free; make room there, "
            "or choose another folder"
        )


def local_folder(place: str, store: Store) -> Path:
    """The folder that a user names. UserError for a place in a store, and for one inside what is to be brought."""
    there = open_store(place)
    if not isinstance(there, FileStore):
        raise UserError(f"{place}: is no folder of this machine; name one, such as ./samples")
    root = there.root.resolve()
    if isinstance(store, FileStore) and root.is_relative_to(store.root.resolve()):
        raise UserError(f"{place}: lies in {store.uri}, which is to be brought; choose another folder")
    return root


def image_folder(root: Path, what: str, class_names: Iterable[str] | None) -> ImageFolder:
    """The folder for images as files: beside that of the shards, which holds nothing else than was brought."""
    folder = Folder(root.with_name(f"{root.name}-images"))
    folder.claim(f"the images of {what}")
    return ImageFolder(folder, None if class_names is None else tuple(class_names))


def download_dataset(uri: str, place: str, unpack: bool, progress: Progress) -> tuple[Index, Download]:
    """Bring the shards of an index, its member tables and itself. UserError for a folder that holds anything else."""
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
        work, enumerate(index.shards), f"restore what is damaged, or run ddpm index {uri} --fresh"
    )
    if index.location.pattern is None:
        download.copy_document(DATASET_CARD_KEY)
        download.copy_document(PACK_REPORT_KEY)
    folder.put(index.name, index_document(index.model_copy(update={"shards_uri": None})))
    return index, download


def _require_distinct(index: Index) -> None:
    names = [shard.name for shard in index.shards]
    if len({*names, index.name, index.tables, DATASET_CARD_KEY, PACK_REPORT_KEY}) != len(names) + 4:
        raise DamageError(
            f"{index.uri}: {index.name}: two of the objects it names have one name; index it again"
        )


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
    """The member tables' object in parts. DamageError when the rows of a shard are not those indexed."""
    yield stream.read(index.tables_offset)
    for entry in index.shards:
        data = stream.read(entry.num_samples * MEMBER.itemsize)
        if hashlib.sha256(data).hexdigest() != entry.table_sha256:
            raise DamageError(
                f"{index.uri}: {index.tables}: the rows of {entry.name} are damaged; run ddpm index {index.uri}"
            )
        yield data
