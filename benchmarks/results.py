"""The table of the quality benchmark's runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.sweeps.store import Table, as_text

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


class Store(Table):
    """A CSV file of runs, all of the columns of this version.

    Parameters
    ----------
    path : Path
        The file; it is made with the first row.
    """

    first, last, grows = COLUMNS, (), False

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, str]]:
        """All whole rows, as text; of several with one key, the last.

        Raises
        ------
        ValueError
            If the file has other columns than this version writes.
        """
        columns = self.columns()
        if columns is not None and columns != COLUMNS:
            found = ", ".join(sorted(set(columns) ^ set(COLUMNS))) or "their order"
            raise ValueError(
                f"{self.path} must have the {len(COLUMNS)} columns of this version, but differs in {found}"
            )
        return list({key_of(row): row for row in super().rows()}.values())


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a run from others, as text."""
    return tuple(as_text(row[name]) for name in KEY)
