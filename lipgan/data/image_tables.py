"""Parquet files with a column of images, as Hugging Face keeps data sets, where the package pyarrow is installed.

Nothing outside of the file is read: of an image that is stored as a path, there is none.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lipgan._arrays import explaining
from lipgan._files import expand_braces
from lipgan._packages import imported
from lipgan.data.image_archives import MAX_BYTES

__all__ = ["COLUMNS", "TableImage", "TableImages"]

# What the column is called where several hold bytes, the first of these that is there.
COLUMNS = ("image", "img", "images", "jpg", "png", "webp", "bytes")

# Rows that are in memory at once.
_ROWS = 16


@dataclass(frozen=True)
class TableImage:
    """A cell of a table; ``str`` names it."""

    table: str
    row: int
    content: bytes | None

    def __str__(self) -> str:
        return f"{self.table}, row {self.row}"

    def open(self) -> io.BytesIO:
        """Its content; ValueError if there is none, or too much."""
        if not self.content:
            raise ValueError("it holds no bytes")
        if len(self.content) > MAX_BYTES:
            raise ValueError(f"it has {len(self.content)} bytes, more than {MAX_BYTES}")
        return io.BytesIO(self.content)


class TableImages:
    """The images of parquet files, row by row: a collection that is read anew with each iteration.

    The column is of bytes, or of structs with a field ``bytes``: the only such, or the first of `COLUMNS`.

    Args:
        name: of a file, or of several with the numbers in braces: train-{00000..00003}-of-00004.parquet.

    Raises:
        ValueError: pyarrow is not installed; no such file, a damaged one, or one without such a column; no rows.
        OSError: a file cannot be read.
    """

    def __init__(self, name: str) -> None:
        self._parquet: Any = imported("pyarrow.parquet", "pyarrow", name)
        self._types: Any = imported("pyarrow.types", "pyarrow", name)
        self._columns: dict[str, str] = {}
        self._length = 0
        for path in expand_braces(name):
            with self._opened(path) as table:
                self._columns[path] = self._column(table.schema_arrow)
                self._length += table.metadata.num_rows
        if not self._length:
            raise ValueError(f"{name} holds no image")

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[TableImage]:
        for path, column in self._columns.items():
            row = 0
            with self._opened(path) as table:
                for batch in table.iter_batches(batch_size=_ROWS, columns=[column]):
                    for cell in batch.column(0).to_pylist():
                        yield TableImage(path, row, cell["bytes"] if isinstance(cell, dict) else cell)
                        row += 1

    @contextmanager
    def _opened(self, path: str) -> Iterator[Any]:
        """The file; whatever pyarrow raises of it is one sentence."""
        # Opened here, because pyarrow's own error for a file that is not there does not say so.
        with explaining(path, "is no table of images"), open(path, "rb") as file:
            yield self._parquet.ParquetFile(file)

    def _column(self, schema: Any) -> str:
        found = [field.name for field in schema if self._has_bytes(field.type)]
        if len(found) != 1:
            found = [name for name in COLUMNS if name in found][:1] or found
        if len(found) != 1:
            columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
            problem = "several columns" if found else "no column"
            raise ValueError(f"it has {problem} of bytes that may be images: {columns or 'none at all'}")
        return str(found[0])

    def _has_bytes(self, kind: Any) -> bool:
        if self._types.is_struct(kind):
            return any(field.name == "bytes" and self._has_bytes(field.type) for field in kind)
        return bool(self._types.is_binary(kind) or self._types.is_large_binary(kind))
