"""The table of a sweep: which runs it holds, and the rows of those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.sweeps.grid import Run, key_of, names_of
from analysis.sweeps.store import Table
from analysis.sweeps.work import ERROR, OBJECTIVE, SECONDS, SEED, text

LAST = (SECONDS, ERROR)


class SweepTable:
    """The rows of the runs of one objective over settings of certain names.

    The columns are ``objective``, the settings, ``seed``, the results, ``seconds`` and ``error``. Runs of other values
    of the same settings may be there too: a grid can grow.

    Parameters
    ----------
    path : str or Path
        A CSV file, or where one is to be.
    objective : str
        Name of the objective.
    runs : sequence of Run
        The runs of the grid.

    Raises
    ------
    ValueError
        If the file is no table of a sweep, or one over other settings or of another objective.
    """

    def __init__(self, path: str | Path, objective: str, runs: Sequence[Run]) -> None:
        self.objective, self.runs, self.names = objective, runs, names_of(runs)
        if Path(path).is_dir():
            raise ValueError(f"{path} is a directory, not a file for the results")
        self._shown = str(path)
        columns = Table(path, ()).columns()
        if columns is not None:
            # The settings in the order in which the file has them.
            self.names = self._settings_of(columns)
        self._store = Table(path, (OBJECTIVE, *self.names, SEED), LAST)
        self.rows()

    def rows(self) -> dict[tuple[str, ...], dict[str, str]]:
        """All rows by their key; of several for one run, the last."""
        rows = self._store.rows()
        other = next((row[OBJECTIVE] for row in rows if row[OBJECTIVE] != self.objective), None)
        if other is not None:
            raise ValueError(
                f"{self._shown} holds runs of {other}, not of {self.objective}: give another file for the results"
            )
        return {tuple(row[name] for name in (*self.names, SEED)): row for row in rows}

    def key(self, run: Run) -> tuple[str, ...]:
        """What tells a run from the others."""
        return key_of(run, self.names)

    def add(self, run: Run, row: Mapping[str, Any]) -> None:
        """Write the row of a run."""
        settings = {name: text(value) for name, value in run.settings.items()}
        results = {name: value for name, value in row.items() if name not in LAST}
        last = {name: row.get(name) for name in LAST}
        self._store.append({OBJECTIVE: self.objective, **settings, SEED: run.seed, **results, **last})

    def frame(self) -> pd.DataFrame:
        """The rows of the grid's runs in its order; settings as in the grid, results as numbers where all are.

        A run that is not there yet has no row. A run that failed has the text of its error in column ``error``, where
        the others have an empty one, and no results.
        """
        rows, found = self.rows(), []
        for run in self.runs:
            row = rows.get(self.key(run))
            if row is not None:
                settings = {name: run.settings.get(name) for name in self.names}
                found.append({**row, **settings, SEED: run.seed})
        columns = self._store.columns() or (OBJECTIVE, *self.names, SEED, *LAST)
        frame = pd.DataFrame(found, columns=list(columns))
        results = [name for name in columns if name not in (OBJECTIVE, *self.names, SEED, ERROR)]
        return frame.assign(**{name: _numbers(frame[name]) for name in results})

    def _settings_of(self, columns: Sequence[str]) -> list[str]:
        if columns[0] != OBJECTIVE or SEED not in columns or tuple(columns[-len(LAST) :]) != LAST:
            raise ValueError(f"{self._shown} is no table of a sweep; its columns are {', '.join(columns)}")
        found = list(columns[1 : columns.index(SEED)])
        if set(found) != set(self.names):
            raise ValueError(
                f"{self._shown} holds runs over {', '.join(found)}, but the grid is over {', '.join(self.names)}: "
                "give another file for the results"
            )
        return found


def _numbers(column: pd.Series) -> pd.Series:
    """Text as numbers or truth values where all of it is; a gap where there is none."""
    filled = column[column != ""]
    if len(filled) and filled.isin(["True", "False"]).all():
        return column.map({"True": True, "False": False})
    try:
        return pd.to_numeric(column.where(column != ""))
    except (TypeError, ValueError):
        return column.where(column != "")
