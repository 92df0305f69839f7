"""Parquet files as rows of Python values, with one line for whatever Arrow says of a damaged one."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddpm_pipeline.errors import UserError


def open_parquet(source: Path | bytes, where: str) -> Any:
    """A pyarrow.parquet.ParquetFile whose schema was read. `where` names it in messages. Raises UserError."""
    import pyarrow as pa  # imported only when needed: 60 ms and 40 MB
    import pyarrow.parquet as pq

    with _one_line_errors(where, "not parquet"):
        table = pq.ParquetFile(source if isinstance(source, Path) else pa.BufferReader(source))
        # What Arrow cannot convert, and names that are no text, are refused now.
        for column in table.schema_arrow:
            leaf_names(column)
        return table


def read_rows(
    table: Any, where: str, batch_size: int, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows in stored order, `batch_size` of them in memory. Raises UserError."""
    with _one_line_errors(where):
        for batch in table.iter_batches(batch_size=batch_size, columns=columns):
            yield from batch.to_pylist()


def leaf_names(column: Any, prefix: str = "") -> list[str]:
    """Dotted names of a column and of the fields inside it."""
    import pyarrow.types as kinds

    name = f"{prefix}{column.name}"
    if not kinds.is_struct(column.type):
        return [name]
    return [
        leaf for i in range(column.type.num_fields) for leaf in leaf_names(column.type.field(i), f"{name}.")
    ]


@contextmanager
def _one_line_errors(where: str, fault: str = "damaged") -> Generator[None]:
    """Whatever Arrow says of a damaged file as a UserError."""
    import pyarrow as pa

    try:
        yield
    # Most of Arrow's errors are also Python's; but some, as for a type that it cannot read, are only its own.
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"source: {where}: {fault} ({reason}); get the file again") from None
