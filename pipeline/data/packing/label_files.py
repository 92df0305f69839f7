"""Labels in files beside the images: dataset.json, CelebA's table, metadata tables, or a .cls or .json per image."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pydantic_core import from_json

from ddpm_pipeline.data.formats.shards import split_name
from ddpm_pipeline.data.packing.celeba import attributes
from ddpm_pipeline.data.packing.labels import choose_field, flatten, is_label_field
from ddpm_pipeline.data.packing.parquet_file import open_parquet, read_rows
from ddpm_pipeline.data.packing.source_files import FileName
from ddpm_pipeline.errors import DamageError, UserError

SIDECARS = ("cls", "label", "json")
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NAME_LISTS = ("classes.txt", "classnames.txt", "labels.txt", "class_names.txt")
_FILE_FIELDS = ("file_name", "filename", "image", "file", "path")
_MAX_CLASS_BYTES = 4096
"""Size limit of a .cls file."""
_MAX_ROWS_PER_FILE = 100
"""Limit of a metadata.parquet's rows, for each file beside it: repeated values take next to no bytes there."""

Read = Callable[[int], bytes]


@dataclass
class SidecarLabels:
    """Labels found in files beside the images."""

    how: str
    """Description of these files."""
    values: list[Any]
    """The raw label of each image; None if it has none."""
    field_chosen: bool
    """Whether the user chose the field."""
    files_read: set[int]
    """Numbers of the files that were read."""
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None
    """Class names by number, if the files say them."""


@dataclass(frozen=True)
class _Search:
    """The input of a search for labels."""

    names: Sequence[FileName]
    images: Sequence[int]
    """Numbers of the images among `names`."""
    read: Read
    column: str | None
    """The field that the user chose."""
    where: str
    number_of: Mapping[FileName, int]
    """The numbers of `names`."""


def sidecar_labels(
    names: Sequence[FileName], images: Sequence[int], read: Read, column: str | None, where: str
) -> SidecarLabels | None:
    """The labels in files beside the images; None without such files or labels.

    dataset.json (StyleGAN, EDM) takes precedence over CelebA's attributes, these over metadata tables (Hugging Face),
    and these over a file per image.
    `images` are the numbers of the images among `names`. Raises UserError for damaged label files.
    """
    number_of = {name: number for number, name in enumerate(names)}
    search = _Search(names, images, read, column, where, number_of)
    for find in (_dataset_json, _celeba, _tables, _sidecars):
        found = find(search)
        if found is not None:
            return found
    if column is not None:
        raise UserError(
            f"label_column: {where} has no json or metadata file with {column!r} beside the images"
        )
    return None


def class_list(names: Sequence[FileName], read: Read, where: str) -> tuple[str, ...] | None:
    """Class names by number from a classes.txt (one per line) at the top level, if present."""
    for number, name in enumerate(names):
        if name.path in NAME_LISTS:
            lines = _text(read(number), f"{where}: {name.full_name}").splitlines()
            return tuple(line.strip() for line in lines if line.strip()) or None
    return None


def _dataset_json(search: _Search) -> SidecarLabels | None:
    files = [name for name in search.names if PurePosixPath(name.path).name == "dataset.json"]
    labels: dict[FileName, Any] = {}
    used: set[int] = set()
    for file in files:
        number = search.number_of[file]
        content = _json(search.read(number), f"{search.where}: {file.full_name}")
        if not isinstance(content, dict) or "labels" not in content:
            continue
        used.add(number)
        listed = content["labels"] or []
        pairs = listed.items() if isinstance(listed, dict) else listed
        try:
            for name, value in pairs:
                labels[_sibling(file, str(name))] = value
        except (TypeError, ValueError):
            raise UserError(
                f"source: {search.where}: {file.full_name}: labels must be pairs of a file name and a class"
            ) from None
    if not used or search.column is not None:
        return None
    return SidecarLabels("dataset.json", [labels.get(search.names[i]) for i in search.images], False, used)


def _celeba(search: _Search) -> SidecarLabels | None:
    found = attributes(search.names, search.images, search.read, search.column, search.where)
    if found is None:
        return None
    notes = () if found.note is None else (found.note,)
    chosen = search.column is not None
    return SidecarLabels(found.how, list(found.values), chosen, {found.file}, notes, found.class_names)


def _tables(search: _Search) -> SidecarLabels | None:
    files = [name for name in search.names if PurePosixPath(name.path).name in TABLES]
    rows: dict[FileName, dict[str, Any]] = {}
    for file in files:
        for row in _rows(file, search.read(search.number_of[file]), search):
            key = next((f for f in (*_FILE_FIELDS, *row) if f in row and _names_a_file(f)), None)
            if key is None:
                raise UserError(
                    f"source: {search.where}: {file.full_name} has no column file_name; it has: {', '.join(row)[:300]}"
                )
            rows[_sibling(file, str(row.pop(key)))] = row
    if not rows:
        return None
    fields = {field for row in rows.values() for field in row}
    if search.column is not None and search.column not in fields and _has_sidecars(search.names):
        return None
    title = PurePosixPath(files[0].path).name
    field = choose_field(search.column, filter(is_label_field, fields), fields, f"{search.where}: {title}")
    if field is None:
        return None
    absent = sum(name not in search.number_of for name in rows)
    notes = (f"{title} names {absent} images that do not exist",) if absent else ()
    values = [rows.get(search.names[i], {}).get(field) for i in search.images]
    return SidecarLabels(
        f"{title}, {field}", values, search.column is not None, {search.number_of[f] for f in files}, notes
    )


def _sidecars(search: _Search) -> SidecarLabels | None:
    if not _has_sidecars(search.names):
        return None
    beside = [_sidecar_numbers(search.names[i], search.number_of) for i in search.images]
    for kind in SIDECARS[:2] if search.column is None else ():
        if any(kind in found for found in beside):
            used = {found[kind] for found in beside if kind in found}
            values = [
                _short_text(search.read(f[kind]), f"{search.where}: {search.names[f[kind]].full_name}")
                if kind in f
                else None
                for f in beside
            ]
            return SidecarLabels(f".{kind} files", values, False, used)
    contents: list[dict[str, Any]] = []
    fields: set[str] = set()
    for found in beside:
        content = (
            flatten(
                _json(search.read(found["json"]), f"{search.where}: {search.names[found['json']].full_name}")
            )
            if "json" in found
            else {}
        )
        fields.update(list(content)[:1000] if len(fields) < 1000 else ())
        contents.append({k: v for k, v in content.items() if k == search.column or is_label_field(k)})
    held = {
        k for content in contents for k, value in content.items() if value is not None or k == search.column
    }
    if not fields:
        return None
    field = choose_field(search.column, held, fields, f"{search.where}: the .json files")
    if field is None:
        return None
    used = {found["json"] for found in beside if "json" in found}
    return SidecarLabels(
        f".json files, {field}", [c.get(field) for c in contents], search.column is not None, used
    )


def _has_sidecars(names: Sequence[FileName]) -> bool:
    return any(name.path.lower().endswith(tuple(f".{kind}" for kind in SIDECARS)) for name in names)


def _sidecar_numbers(image: FileName, number_of: Mapping[FileName, int]) -> dict[str, int]:
    """The label files of an image by kind, named like it up to the last or the first dot."""
    stems = [image.path.rpartition(".")[0]]
    if (split := split_name(image.path)) is not None and split[0] != stems[0]:
        stems.append(split[0])
    found: dict[str, int] = {}
    for kind in SIDECARS:
        for stem in stems:
            number = number_of.get(FileName(image.archive, f"{stem}.{kind}"))
            if number is not None:
                found.setdefault(kind, number)
    return found


def _sibling(file: FileName, name: str) -> FileName:
    """The file that a label file refers to, relative to the top of its archive or source."""
    folder = PurePosixPath(file.path).parent
    parts = [p for p in (folder / name.replace("\\", "/")).parts if p != "."]
    return FileName(file.archive, "/".join(parts))


def _names_a_file(field: str) -> bool:
    """Whether a column of a metadata table names images; Hugging Face also knows `image_file_name` and the like."""
    return field in _FILE_FIELDS or field.endswith("_file_name")


def _rows(file: FileName, data: bytes, search: _Search) -> Iterator[dict[str, Any]]:
    where = search.where
    if file.path.endswith(".parquet"):
        yield from _parquet_rows(data, f"{where}: {file.full_name}", _MAX_ROWS_PER_FILE * len(search.names))
        return
    text = _text(data, f"{where}: {file.full_name}").removeprefix("\ufeff")
    if file.path.endswith(".csv"):
        try:
            for row in csv.DictReader(io.StringIO(text)):
                yield {str(k): v for k, v in row.items() if k is not None}
        except csv.Error as error:
            raise UserError(f"source: {where}: {file.full_name}: damaged ({error}); write it again") from None
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            content = _json(line.encode(), f"{where}: {file.full_name}: line {number}")
            yield flatten(content)


def _parquet_rows(data: bytes, where: str, max_rows: int) -> Iterator[dict[str, Any]]:
    table = open_parquet(data, where)
    if table.metadata.num_rows > max_rows:
        raise UserError(f"source: {where} has {table.metadata.num_rows:,} rows; the limit is {max_rows:,}")
    for row in read_rows(table, where, 1024):
        yield flatten(row)


def _short_text(data: bytes, where: str) -> str:
    if len(data) > _MAX_CLASS_BYTES:
        raise UserError(f"source: {where} has {len(data)} bytes; a class is expected; or set labels=none")
    return _text(data, where).strip()


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UserError(f"source: {where} is not UTF-8; write it again") from None


def _json(data: bytes, where: str) -> Any:
    try:
        return from_json(data)
    except ValueError as error:
        raise UserError(
            f"source: {where}: damaged json ({error}); write it again, or set labels=none"
        ) from None


def with_user_errors(read: Read, names: Sequence[FileName], where: str) -> Read:
    """`read`, but raising UserError for a label file that cannot be read."""

    def reading(number: int) -> bytes:
        try:
            return read(number)
        except (OSError, DamageError) as error:
            raise UserError(f"source: {where}: {names[number].full_name}: cannot be read ({error})") from None

    return reading
