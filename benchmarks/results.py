"""A table on disk to which several processes append, a row as each run ends."""

from __future__ import annotations

import csv
import fcntl
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEY = ("task", "arm", "settings", "seed", "learning_rate", "epochs", "train_rows")
"""The columns that tell one run from another."""

COLUMNS = (
    *KEY,
    "adapter_parameters",
    "trainable_parameters",
    "validation",
    "test",
    "seconds",
    "cpu_seconds",
    "calibration_seconds",
    "nmi",
    "max_vio",
    "final_loss",
    "diverged",
    "error",
    "note",
    "versions",
)


class Store:
    """A CSV file of runs.

    Rows are appended whole under a lock. A process killed while it wrote leaves a last line without its end; readers
    ignore that line and the next writer cuts it off.

    Parameters
    ----------
    path : Path
        The file; it is made with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, str]]:
        """All whole rows, as text; of several with one key, the last.

        Raises
        ------
        ValueError
            If the file has other columns than this version writes.
        """
        text = self.path.read_text() if self.path.exists() else ""
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        if reader.fieldnames is not None and tuple(reader.fieldnames) != COLUMNS:
            found = ", ".join(sorted(set(reader.fieldnames) ^ set(COLUMNS))) or "their order"
            raise ValueError(
                f"{self.path} must have the {len(COLUMNS)} columns of this version, but differs in {found}"
            )
        return list({key_of(row): row for row in reader}.values())

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row to the end of the file, and to the disk."""
        line = io.StringIO()
        writer = csv.DictWriter(line, COLUMNS, restval="", lineterminator="\n")
        with self._locked() as file:
            if file.tell() == 0:
                writer.writeheader()
            # A line is a row, whatever an error message contains.
            writer.writerow({name: " ".join(_text(value).split()) for name, value in row.items()})
            file.write(line.getvalue().encode())

    @contextmanager
    def _locked(self) -> Iterator[Any]:
        """The file, locked for this process, with its position after the last whole line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, io.SEEK_END)
            yield file


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a run from others, as text."""
    return tuple(_text(row[name]) for name in KEY)


def _text(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)
