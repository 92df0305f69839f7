"""Pictures in one big file that has no cheap random access of its own: tars and parquet."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.shards import plain_stream, split_name
from pipeline.data.sources import PICTURES, Item, Source, classed, common_folder, pictures
from pipeline.data.tar import read_members
from pipeline.errors import DamageError, UserError


class Blob:
    """Byte strings by number, kept in an unnamed temporary file, so that memory does not grow with them."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="ddpm-pack-")  # noqa: SIM115 - lives as long as the source
        self._places: list[tuple[int, int]] = []
        self._end = 0

    def add(self, data: bytes) -> int:
        """Keep `data`; its number."""
        self._file.write(data)
        self._places.append((self._end, len(data)))
        self._end += len(data)
        return len(self._places) - 1

    def get(self, number: int) -> bytes:
        """Bytes by number; safe for several threads once everything is added."""
        self._file.flush()
        offset, size = self._places[number]
        return os.pread(self._file.fileno(), size, offset)


class TarSource(Source):
    """Pictures in a tar or tar.gz, laid out as in a folder, or as a WebDataset with a .cls beside each picture."""

    def __init__(self, path: Path) -> None:
        self._blob = Blob()
        numbers: dict[str, int] = {}
        labels: dict[str, int] = {}
        others = 0
        for name, data in _tar_files(path):
            key, extension = split_name(name) or (name, "")
            if name.lower().endswith(PICTURES):
                if name in numbers:
                    raise UserError(f"source: {path}: {name} occurs twice; keep one")
                numbers[name] = self._blob.add(data)
            elif extension == "cls":
                labels[key] = _class_number(data, f"source: {path}: {name}")
            else:
                others += 1
        names, hidden = pictures(sorted(numbers), str(path))
        self.other_files = others + hidden
        if labels:
            self.class_names = None
            self.items = [Item(name, _label_beside(name, labels, path)) for name in names]
            self._numbers = [numbers[name] for name in names]
            return
        prefix = common_folder(names)
        self.items, self.class_names = classed([name[len(prefix) :] for name in names], str(path))
        self._numbers = [numbers[name] for name in names]

    def read(self, number: int) -> bytes:
        return self._blob.get(self._numbers[number])


class ParquetSource(Source):
    """Parquet in the Hugging Face image layout: a column of {bytes, path} or of bytes, and integer labels.

    The first column of such a type is the image; `label`, `labels`, `class` or `fine_label` the class. Class names
    come from the schema's "huggingface" metadata when they are there.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq  # 60 ms and 40 MB: for this source only

        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        self._blob = Blob()
        items: list[Item] = []
        self.class_names = None
        for file in files:
            try:
                table = pq.ParquetFile(file)
            except (OSError, ValueError) as error:
                raise UserError(f"source: {file}: not parquet ({str(error).splitlines()[0]})") from None
            image, label = _columns(table.schema_arrow, file)
            self.class_names = _hugging_face_names(table.schema_arrow.metadata, label) or self.class_names
            columns = [image] if label is None else [image, label]
            for row, record in enumerate(_parquet_rows(table, columns, file)):
                name = f"{file.name}#{row:09d}"
                value = record[image]
                data = value.get("bytes") if isinstance(value, dict) else value
                if data is None:
                    raise UserError(
                        f"source: {name}: holds no image bytes; only embedded images can be packed"
                    )
                self._blob.add(data)
                items.append(Item(name, -1 if label is None else _parquet_label(record[label], name)))
        if not items:
            raise UserError(f"source: {path} holds no rows; check the path")
        self.items = items

    def read(self, number: int) -> bytes:
        return self._blob.get(number)


def _parquet_rows(table: Any, columns: Sequence[str], file: Path) -> Iterator[dict[str, Any]]:
    try:
        for batch in table.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # Arrow's own errors are both
        raise UserError(
            f"source: {file}: damaged ({str(error).splitlines()[0]}); get the file again"
        ) from None


def _tar_files(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with path.open("rb") as file, plain_stream(file, str(path)) as plain:
            for member, data in read_members(plain, str(path)):
                yield member.name.removeprefix("./"), data
    except DamageError as error:
        raise UserError(f"source: {error}; get the file again") from error


def _class_number(data: bytes, where: str) -> int:
    text = data.strip()
    if not text.isdigit() or len(text) > 9:
        raise UserError(f"{where} holds {text[:40]!r}; a class number is expected")
    return int(text)


def _label_beside(name: str, labels: dict[str, int], path: Path) -> int:
    key, _ = split_name(name) or (name, "")
    if key not in labels:
        raise UserError(
            f"source: {path}: {name} has no .cls beside it, others do; add it or remove the others"
        )
    return labels[key]


def _columns(schema: Any, file: Path) -> tuple[str, str | None]:
    import pyarrow.types as kinds

    def holds_bytes(kind: Any) -> bool:
        if kinds.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return kinds.is_binary(kind) or kinds.is_large_binary(kind)

    image = next((field.name for field in schema if holds_bytes(field.type)), None)
    if image is None:
        raise UserError(f"source: {file}: no column holds image bytes (columns: {', '.join(schema.names)})")
    wanted = ("label", "labels", "class", "fine_label")
    return image, next(
        (n for n in wanted if n in schema.names and kinds.is_integer(schema.field(n).type)), None
    )


def _hugging_face_names(metadata: dict[bytes, bytes] | None, label: str | None) -> tuple[str, ...] | None:
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None  # a parquet without, or with other, metadata: its labels stay numbers
    return tuple(str(name) for name in names)


def _parquet_label(value: Any, name: str) -> int:
    if not isinstance(value, int) or value < 0:
        raise UserError(
            f"source: {name}: label {value!r}; every row needs a class number from 0, or none a label"
        )
    return value
