"""CelebA's tables beside its images: 40 attributes of each face, and the split it belongs to.

Source: Liu, Luo, Wang, Tang, "Deep learning face attributes in the wild" (ICCV 2015). `list_attr_celeba.txt` holds the
number of images, a line of attribute names, and a line for each image: its name and 1 or -1 for each attribute.
`list_eval_partition.txt` holds an image's name and 0 (train), 1 (validation) or 2 (test). Copies on Kaggle are .csv,
with a line of column names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ddpm_pipeline.data.packing.source_files import FileName
from ddpm_pipeline.errors import UserError

ATTRIBUTE_TABLES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
PARTITION_TABLES = ("list_eval_partition.txt", "list_eval_partition.csv")
_SPLITS = {"0": "train", "1": "validation", "2": "test"}
_HAS = {"-1": 0, "0": 0, "1": 1}

Read = Callable[[int], bytes]


@dataclass(frozen=True)
class _Table:
    """A table by image name, without folders."""

    number: int
    """Of its file."""
    title: str
    columns: list[str]
    rows: dict[str, list[str]]


@dataclass(frozen=True)
class Attributes:
    """One attribute of each image as its class, or no class if none was chosen."""

    how: str
    values: list[int | None]
    """1 where an image has the attribute, 0 where it does not, None where the table does not name it."""
    class_names: tuple[str, str] | None
    file: int
    """Number of the table among the files."""
    note: str | None


def is_celeba_table(name: FileName) -> bool:
    """Whether a file is one of the tables read here."""
    return PurePosixPath(name.path).name in (*ATTRIBUTE_TABLES, *PARTITION_TABLES)


def attributes(
    names: Sequence[FileName], images: Sequence[int], read: Read, chosen: str | None, where: str
) -> Attributes | None:
    """The chosen attribute of each image; None without CelebA's table. Raises UserError for an unknown attribute."""
    table = _find(names, ATTRIBUTE_TABLES, read, where, num_titles=1)
    if table is None:
        return None
    if chosen is None:
        note = (
            f"{table.title}: {len(table.columns)} attributes ({', '.join(table.columns[:3])}, …): "
            "label_column=NAME makes one of them the class"
        )
        return Attributes(table.title, [None] * len(images), None, table.number, note)
    if chosen not in table.columns:
        raise UserError(
            f"label_column: {where}: {table.title} has no {chosen!r}; it has: {', '.join(table.columns[:50])}"
        )
    column = table.columns.index(chosen)
    rows = [table.rows.get(PurePosixPath(names[i].path).name) for i in images]
    if not any(rows):
        raise UserError(
            f"source: {where}: {table.title} names none of the images ({names[images[0]].full_name})"
        )
    values = [None if row is None else _has(row[column], table, where) for row in rows]
    return Attributes(f"{table.title}, {chosen}", values, (f"not {chosen}", chosen), table.number, None)


def partition(
    names: Sequence[FileName], images: Sequence[int], read: Read, where: str
) -> tuple[int, list[str | None]] | None:
    """The number of CelebA's table of splits, and the split of each image; None without the table."""
    table = _find(names, PARTITION_TABLES, read, where, num_titles=0)
    if table is None:
        return None
    rows = (table.rows.get(PurePosixPath(names[i].path).name) for i in images)
    return table.number, [None if row is None else _split(row, table, where) for row in rows]


def _find(
    names: Sequence[FileName], titles: Sequence[str], read: Read, where: str, num_titles: int
) -> _Table | None:
    """The table of one of these names, if there is one. `num_titles`: lines of column names in its .txt form."""
    number = next((i for i, name in enumerate(names) if PurePosixPath(name.path).name in titles), None)
    if number is None:
        return None
    title = PurePosixPath(names[number].path).name
    is_csv = title.endswith(".csv")
    lines = read(number).decode(errors="backslashreplace").splitlines()
    words = [line.split("," if is_csv else None) for line in lines if line.strip()]
    columns: list[str] = []
    if is_csv and words:
        columns, words = words[0][1:], words[1:]
    elif num_titles:
        columns, words = (words[1] if len(words) > 1 else []), words[2:]
    width = 1 + (len(columns) or 1)
    wrong = next((row for row in words if len(row) != width), None)
    if wrong is not None or not words:
        told = (
            f"a line of {len(wrong)} words ({' '.join(wrong)[:40]!r}), {width} expected"
            if wrong
            else "no rows"
        )
        raise UserError(f"source: {where}: {names[number].full_name}: {told}; get the file again")
    return _Table(number, title, columns, {row[0]: row[1:] for row in words})


def _has(value: str, table: _Table, where: str) -> int:
    if value not in _HAS:
        raise UserError(f"source: {where}: {table.title} holds {value[:40]!r}; 1 or -1 expected")
    return _HAS[value]


def _split(row: list[str], table: _Table, where: str) -> str:
    if row[0] not in _SPLITS:
        raise UserError(f"source: {where}: {table.title} holds the split {row[0][:40]!r}; 0, 1 or 2 expected")
    return _SPLITS[row[0]]
