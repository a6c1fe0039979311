"""A table on disk to which several processes append, a row as each run ends."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from tucka.files import write_atomically


class Table:
    """A CSV file of rows.

    Rows are appended whole under a lock, which is a hidden file beside the table. A process killed while it wrote
    leaves a last line without its end; readers ignore that line and the next writer cuts it off.

    Parameters
    ----------
    path : str or Path
        The file; it is made with the first row.
    first, last : sequence of str
        Columns at the left and at the right of every such table.
    grows : bool
        Whether a row may bring columns of its own. They are put between the others, in a new file in place of the old.
    """

    path: Path
    first: tuple[str, ...]
    last: tuple[str, ...]
    grows: bool

    def __init__(self, path: str | Path, first: Sequence[str], last: Sequence[str] = (), grows: bool = True) -> None:
        # Replacing a link would leave what it points to behind.
        self.path = Path(path).resolve()
        self.first, self.last, self.grows = tuple(first), tuple(last), grows

    def columns(self) -> tuple[str, ...] | None:
        """The columns of the file, or None without a file or a whole first line."""
        return self._read()[0]

    def rows(self) -> list[dict[str, str]]:
        """All whole rows, as text.

        Raises
        ------
        ValueError
            If the file is no table, or a row has another number of cells than there are columns.
        """
        columns, rows = self._read()
        return [dict(zip(columns or (), row)) for row in rows]

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row to the end of the file, and to the disk.

        Raises
        ------
        ValueError
            If the row has columns that the table may not have.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock():
            columns, rows = self._read()
            known = (*self.first, *self.last) if columns is None else columns
            new = [name for name in row if name not in known]
            if new and not self.grows:
                raise ValueError(f"{self.path} has no column {', '.join(new)}")
            if new and columns is not None:
                self._replace(columns, self._widened(columns, new), rows)
            names = self._widened(known, new)
            # A line is a row, whatever an error message contains.
            line = _line(" ".join(as_text(row.get(name)).split()) for name in names)
            with self.path.open("a+b") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                file.seek(0, io.SEEK_END)
                file.write((line if columns is not None else _line(names) + line).encode())
                file.flush()
                os.fsync(file.fileno())

    def _widened(self, columns: Sequence[str], new: Sequence[str]) -> tuple[str, ...]:
        place = len(columns) - len(self.last)
        return (*columns[:place], *new, *columns[place:])

    def _replace(self, old: Sequence[str], names: Sequence[str], rows: list[list[str]]) -> None:
        """Write the table anew with more columns; the old file stays until the new one is whole."""
        lines = [names, *([dict(zip(old, row)).get(name, "") for name in names] for row in rows)]
        text = "".join(map(_line, lines))
        write_atomically(self.path, lambda temporary: temporary.write_bytes(text.encode()))

    def _read(self) -> tuple[tuple[str, ...] | None, list[list[str]]]:
        """The columns, and the cells of every row."""
        data = self.path.read_bytes() if self.path.exists() else b""
        try:
            # Strict: a quote that is never closed would swallow the rows after it.
            whole = data[: data.rfind(b"\n") + 1].decode("utf-8-sig")
            lines = list(csv.reader(io.StringIO(whole, newline=""), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{self.path} is no table of runs: {error}") from error
        if not lines:
            return None, []
        columns, *rows = lines
        for number, row in enumerate(rows, start=2):
            if len(row) != len(columns):
                raise ValueError(
                    f"row {number} of {self.path} has {len(row)} cells, but there are {len(columns)} columns"
                )
        return tuple(columns), rows

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            yield


def _line(cells: Any) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def as_text(value: Any) -> str:
    """A cell; a float with all its digits, nothing as an empty cell."""
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)
