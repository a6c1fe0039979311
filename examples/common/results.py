"""One table for all examples: a row for every run, written as the run ends, and looked up before one is done."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.sweeps.store import Table, as_text

KEY = ("example", "dataset", "model", "method", "settings", "seed", "learning_rate", "epochs", "train_rows")
"""The columns that tell a run from others."""

MEASURED = (
    "adapter_parameters", "trainable_parameters", "metric", "score", "validation", "seconds", "cpu_seconds", "versions",
)  # fmt: skip
"""The columns of what came of it: scores are in percent, seconds those of calibration, training and scoring; none for a
run that was interrupted."""

NUMBERS_OF_KEY = {"seed": int, "learning_rate": float, "epochs": float, "train_rows": int}

NUMBERS = (*NUMBERS_OF_KEY, *MEASURED[:2], "score", "validation", "seconds", "cpu_seconds")

PACKAGES = ("torch", "transformers", "peft", "tucka")


def append(path: str | Path, row: Mapping[str, Any]) -> None:
    """Add a row to a table, whole or not at all, also where several processes add theirs.

    Parameters
    ----------
    path : str or Path
        A CSV file; it is made with its first row.
    row : dict
        Values of `KEY` and `MEASURED`; ``settings`` may be a dictionary. The packages' versions are filled in.

    Raises
    ------
    ValueError
        If a column of the key is missing, or the row has another column.
    """
    missing = [name for name in KEY if name not in row]
    if missing:
        raise ValueError(f"a row has the columns {', '.join(KEY)}; {', '.join(missing)} is missing")
    versions = " ".join(f"{name}={version(name)}" for name in PACKAGES)
    _table(path).append({"versions": versions, **row, "settings": _settings(row["settings"])})


def found(path: str | Path, key: Mapping[str, Any]) -> dict[str, str] | None:
    """The last row of a run, as text, or None."""
    wanted = _identity(key)
    return next((row for row in reversed(_table(path).rows()) if _identity(row) == wanted), None)


def runs(path: str | Path, example: str | None = None, dataset: str | None = None) -> pd.DataFrame:
    """All runs of a table, of one example or dataset; of several rows of one run, the last."""
    rows = {_identity(row): row for row in _table(path).rows()}
    frame = pd.DataFrame(rows.values(), columns=[*KEY, *MEASURED])
    for name in NUMBERS:
        frame[name] = pd.to_numeric(frame[name])
    for name, value in (("example", example), ("dataset", dataset)):
        if value is not None:
            frame = frame[frame[name] == value]
    return frame.reset_index(drop=True)


def only(frame: pd.DataFrame, keys: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The runs of some keys."""
    wanted = {_identity(key) for key in keys}
    return frame[[_identity(row) in wanted for row in frame[list(KEY)].to_dict("records")]].reset_index(drop=True)


def averages(frame: pd.DataFrame) -> pd.DataFrame:
    """Average the runs that differ in their seed alone.

    Returns
    -------
    DataFrame
        Columns ``example``, ``dataset``, ``model``, ``method``, ``settings``, ``learning_rate``, ``epochs``,
        ``train_rows``, ``parameters`` (the adapter's), ``metric``, ``score`` (mean), ``error`` (its standard error;
        NaN for one seed), ``seeds``, ``validation``, ``seconds`` and ``cpu_seconds`` (means); best score first.
    """
    groups = frame.groupby([name for name in KEY if name != "seed"], sort=False, dropna=False)
    means = groups.agg(
        parameters=("adapter_parameters", "first"),
        metric=("metric", "first"),
        score=("score", "mean"),
        error=("score", "sem"),
        seeds=("seed", "count"),
        validation=("validation", "mean"),
        seconds=("seconds", "mean"),
        cpu_seconds=("cpu_seconds", "mean"),
    )
    order = dict(by=["example", "dataset", "model", "score"], ascending=[True, True, True, False])
    return means.reset_index().sort_values(**order, ignore_index=True)


def table(path: str | Path, example: str, dataset: str | None = None) -> pd.DataFrame:
    """The `averages` of an example's runs."""
    return averages(runs(path, example, dataset))


def _table(path: str | Path) -> Table:
    return Table(path, (*KEY, *MEASURED), grows=False)


def _identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The key of a row as text; numbers that are equal are written alike."""
    values = {**{name: row[name] for name in KEY}, "settings": _settings(row["settings"])}
    for name, kind in NUMBERS_OF_KEY.items():
        values[name] = None if values[name] in (None, "") else kind(values[name])
    return tuple(as_text(values[name]) for name in KEY)


def _settings(settings: Mapping[str, Any] | str) -> str:
    return settings if isinstance(settings, str) else json.dumps(dict(settings), sort_keys=True)


def read_settings(text: str) -> dict[str, Any]:
    """The settings of a row, as they were."""
    return json.loads(text)
