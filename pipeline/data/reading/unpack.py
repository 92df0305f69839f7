"""Images of shards as files: one folder per class, numbered files. No file name is taken from a bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ddpm_pipeline.data.formats.images import EXTENSIONS
from ddpm_pipeline.data.formats.shards import plain_stream, read_samples
from ddpm_pipeline.data.index import MemberTable
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.store.download_folder import Folder

MAX_IMAGES_PER_FOLDER = 10_000
"""Images per folder where they have no classes."""
_LONGEST_BYTES = 100
_ALLOWED = " ._-+,()'"


class ImageFolder:
    """Images by class and number in a local folder."""

    def __init__(self, folder: Folder, class_names: Sequence[str] | None) -> None:
        self.folder, self._names = folder, folder_names(class_names or ())

    def put(self, label: int, number: int, extension: str, data: bytes) -> None:
        """Write an image unless it exists. Without classes the label is -1."""
        self.folder.keep(self._key(label, number, extension), data)

    def get(self, label: int, number: int, extension: str) -> bytes | None:
        """The bytes of an image that `put` wrote; None if there is none."""
        found = self.folder.open(self._key(label, number, extension))
        if found is None:
            return None
        with found:
            return found.read()

    def _key(self, label: int, number: int, extension: str) -> str:
        if label < 0:
            group = f"{number // MAX_IMAGES_PER_FOLDER:06d}"
        else:
            group = self._names[label] if label < len(self._names) else str(label)
        return f"{group}/{number:012d}.{extension}"


def folder_names(class_names: Sequence[str]) -> list[str]:
    """A folder name for each class, distinct on any file system. Letters, digits and a few symbols are kept."""
    names: list[str] = []
    seen: set[str] = set()
    for label, text in enumerate(class_names):
        name = "".join(char if char.isalnum() or char in _ALLOWED else "_" for char in text)
        name = name.encode()[:_LONGEST_BYTES].decode(errors="ignore").strip(" .-") or "_"
        while name.casefold() in seen:
            name = f"{name}-{label}"
        seen.add(name.casefold())
        names.append(name)
    return names


def indexed_images(path: Path, label: str, table: MemberTable) -> Iterator[tuple[int, str, int, bytes]]:
    """(row, extension, class, bytes) of each image that a shard's member table lists.

    Raises DamageError when images are missing from the shard.
    """
    rows = {int(row["offset"]): (number, int(row["label"])) for number, row in enumerate(table)}
    with path.open("rb") as file, plain_stream(file, label) as plain:
        for _, parts in read_samples(plain, label):
            for extension, (member, data) in parts.items():
                if (found := rows.pop(member.offset, None)) is not None:
                    kind = extension.rpartition(".")[2]
                    yield found[0], kind if kind in EXTENSIONS else "image", found[1], data
    if rows:
        raise DamageError(f"{label}: {len(rows)} indexed images are missing; index it again")
