"""Parquet files that contain images, or paths of images beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.packing.archives import TemporaryCopies, require_temp_space
from ddpm_pipeline.data.packing.dataset_card import class_features, read_card
from ddpm_pipeline.data.packing.folder_layout import choose_split, split_word
from ddpm_pipeline.data.packing.labels import (
    choose_field,
    describe_classes,
    flatten,
    is_label_field,
    to_class_numbers,
)
from ddpm_pipeline.data.packing.parquet_file import leaf_names, open_parquet, read_rows
from ddpm_pipeline.data.packing.source_files import MAX_FILE_BYTES
from ddpm_pipeline.data.packing.sources import Item, Source
from ddpm_pipeline.errors import UserError

_IMAGE_COLUMNS = ("image", "img", "picture", "photo", "pixel_values", "jpg", "png", "jpeg", "webp")
_PATH_COLUMNS = ("image", "file_name", "filename", "image_path", "img_path", "path", "file", "filepath")


@dataclass(frozen=True)
class Columns:
    """The relevant columns of a file."""

    image: str
    embedded: bool
    """Whether the column holds the images' bytes, not just their paths."""
    label: str | None
    class_names: tuple[str, ...] | None


@dataclass
class _Rows:
    """Rows collected from the files."""

    names: list[str] = field(default_factory=list[str])
    places: list[tuple[int, int] | Path] = field(default_factory=list[tuple[int, int] | Path])
    labels: list[Any] = field(default_factory=list[Any])


class ParquetSource(Source):
    """Rows of parquet files: an image's bytes, {bytes, path} or path, and its class in another column.

    Image bytes are copied to a temporary file, because rows can only be read in stored order.
    Class names come from the schema's "huggingface" metadata, else from a README.md (Hugging Face's card) at the top.
    """

    def __init__(self, files: Sequence[Path], config: PackConfig, where: str, left_out: Counter[str]) -> None:
        self.config, self.left_out = config, left_out
        self._spool = TemporaryCopies(where)
        words = [split_word(str(file.relative_to(_common_folder(files)))) for file in files]
        files = [files[i] for i in choose_split(words, config.split, where)]
        rows = _Rows()
        found: dict[Path, Columns] = {}
        notes: list[str] = []
        needed_bytes = 0
        top = Path(where) if Path(where).is_dir() else _common_folder(files)
        card = read_card(top)
        for file in files:
            table = open_parquet(file, str(file))
            of_card = class_features(card, file.relative_to(top).parts)
            found[file], new_notes = find_columns(table.schema_arrow, config, file, of_card)
            notes += [note for note in new_notes if note not in notes]
            needed_bytes += _image_bytes(table.metadata, found[file])
        require_temp_space(where, needed_bytes)
        for file in files:
            self._add(open_parquet(file, str(file)), found[file], file, rows)
        if not rows.names:
            raise UserError(f"source: {where} holds no rows; check the path")
        if config.split:
            notes.append(f"split {config.split}: {len(files)} of {len(words)} files")
        self._places = rows.places
        inside = Path(where) if Path(where).is_dir() and not config.image_root else None
        self.self_contained = inside is not None or not any(isinstance(p, Path) for p in rows.places)
        self._spool.finish()
        self.copied_bytes = self._spool.num_bytes
        self._label(found, rows, where, notes)

    def read(self, number: int) -> bytes:
        place = self._places[number]
        if not isinstance(place, Path):
            return self._spool.get(*place)
        if place.stat().st_size > MAX_FILE_BYTES:
            raise OSError(f"it has more than {MAX_FILE_BYTES} bytes")
        return place.read_bytes()

    def _add(self, table: Any, columns: Columns, file: Path, rows: _Rows) -> None:
        image, label = columns.image, columns.label
        wanted = [image] if label is None else [image, label]
        for row, record in enumerate(read_rows(table, str(file), 256, wanted)):
            name = f"{file.name}#{row:09d}"
            leaves = record if label is None or label in record else {**record, **flatten(record)}
            value = record[image]
            data = value.get("bytes") if isinstance(value, dict) else value if columns.embedded else None
            if data is not None:
                rows.places.append(self._spool.add(data))
            else:
                path = value.get("path") if isinstance(value, dict) else value
                rows.places.append(_image_path(path, file, name, self.config.image_root))
            rows.names.append(name)
            rows.labels.append(None if label is None else leaves.get(label))

    def _label(self, found: dict[Path, Columns], rows: _Rows, where: str, notes: list[str]) -> None:
        listed = {columns.class_names: file for file, columns in found.items() if columns.label is not None}
        if len(listed) > 1:
            (a, file_a), (b, file_b) = list(listed.items())[:2]
            raise UserError(
                f"source: {file_a.name} and {file_b.name} name their classes differently "
                f"({_excerpt(a)}; {_excerpt(b)}); pack one of them, or set labels=none"
            )
        names = next(iter(listed), None)
        fields = sorted({columns.label for columns in found.values() if columns.label is not None})
        how = f"column {', '.join(fields)}"
        chosen = self.config.label_column is not None
        labels, self.class_names = to_class_numbers(rows.labels, rows.names, f"{where}: {how}", names, chosen)
        if fields:
            notes.append(
                describe_classes(how, self.class_names, labels) if labels[0] >= 0 else f"{how}: no labels"
            )
        self.items = [Item(name, label) for name, label in zip(rows.names, labels, strict=True)]
        self.notes = tuple(notes)


def has_image_column(file: Path) -> bool:
    """Whether a column may hold image bytes; False for tables about images, and for files that are no parquet."""
    try:
        return bool(_byte_columns(open_parquet(file, str(file)).schema_arrow))
    except UserError:
        return False


def find_columns(
    schema: Any, config: PackConfig, file: Path, of_card: Mapping[str, Any]
) -> tuple[Columns, list[str]]:
    """The columns of image and class, and notes on alternatives. `of_card`: features as a card states them.

    Raises UserError.
    """
    features = {**of_card, **_hugging_face_features(schema.metadata)}
    bytes_columns = _byte_columns(schema)
    embedded = [c for c in bytes_columns if _is_image(features, c)] or bytes_columns
    image = _image_column(config.image_column, embedded, schema, file)
    notes = [f"column {c} also holds bytes and is skipped" for c in bytes_columns if c != image]
    label = names = None
    if config.labels != "none":
        fields = {name for c in schema for name in leaf_names(c) if c.name != image}
        candidates = [f for f in fields if is_label_field(f) or _class_names(features, f) is not None]
        label = choose_field(config.label_column, candidates, fields, str(file))
        others = sorted(set(candidates) - {label})
        names = None if label is None else _class_names(features, label)
        notes += [f"column {label} is the class; other candidates: {', '.join(others)}"] if others else []
        if label is None and fields:
            notes.append(
                f"no labels: none of the columns {', '.join(sorted(fields)[:20])} has the usual name of a class column"
            )
    return Columns(image, image in bytes_columns, label, names), notes


def _image_column(wanted: str | None, embedded: list[str], schema: Any, file: Path) -> str:
    import pyarrow.types as kinds

    if wanted is not None:
        if wanted not in schema.names:
            raise UserError(
                f"image_column: {file} has no column {wanted!r}; it has: {', '.join(schema.names)}"
            )
        return wanted
    if not embedded:
        texts = [c.name for c in schema if kinds.is_string(c.type) or kinds.is_large_string(c.type)]
        paths = [name for name in _PATH_COLUMNS if name in texts]
        if not paths:
            raise UserError(
                f"source: {file}: no column holds image bytes or paths (columns: {', '.join(schema.names)}); "
                "name it with image_column"
            )
        return paths[0]
    named = [c for c in embedded if c.lower() in _IMAGE_COLUMNS]
    if len(embedded) == 1 or len(named) == 1 or "image" in named:
        return "image" if "image" in named else (named or embedded)[0]
    raise UserError(
        f"source: {file}: each of the columns {', '.join(embedded)} could be the image; set image_column"
    )


def _byte_columns(schema: Any) -> list[str]:
    import pyarrow.types as kinds

    def holds_bytes(kind: Any) -> bool:
        if kinds.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return kinds.is_binary(kind) or kinds.is_large_binary(kind)

    return [column.name for column in schema if holds_bytes(column.type)]


def _hugging_face_features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    try:
        features = from_json((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}  # a parquet without, or with other, metadata: its labels stay numbers
    return features if isinstance(features, dict) else {}


def _is_image(features: dict[str, Any], column: str) -> bool:
    feature = features.get(column)
    return isinstance(feature, dict) and feature.get("_type") == "Image"


def _class_names(features: dict[str, Any], column: str) -> tuple[str, ...] | None:
    feature: Any = features
    for part in column.split("."):
        feature = feature.get(part) if isinstance(feature, dict) else None
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _image_bytes(metadata: Any, columns: Columns) -> int:
    """Bytes of a file's columns, nearly all of which are its images; an image shared by several rows may count once.

    Not of the column alone: where its metadata is damaged, pyarrow ends the process instead of raising.
    """
    if not columns.embedded:
        return 0
    return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def _image_path(path: Any, file: Path, name: str, root: str | None) -> Path:
    """The image file that a row names. It must be inside the parquet's folder or `image_root`."""
    if not isinstance(path, str) or not path:
        raise UserError(f"source: {name}: holds neither image bytes nor a path; remove the row")
    top = Path(root).expanduser().resolve() if root else file.parent.resolve()
    found = top / path
    if not found.resolve().is_relative_to(top):
        raise UserError(
            f"source: {name}: names the image {path!r} outside {top}; set image_root to the folder of the images"
        )
    return found


def _common_folder(files: Sequence[Path]) -> Path:
    """The deepest folder that contains all files."""
    folder = files[0].parent
    while not all(file.is_relative_to(folder) for file in files):
        folder = folder.parent
    return folder


def _excerpt(names: tuple[str, ...] | None) -> str:
    return "no names" if names is None else ", ".join(names[:8])
