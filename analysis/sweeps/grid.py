"""The runs of a sweep, from lists of values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from analysis.sweeps.work import RESERVED, finite, text

Grid = Mapping[str, Iterable[Any]] | Sequence[Mapping[str, Iterable[Any]]]
"""Names and the values of each, or several such grids whose runs are put together."""

MOST = 1_000_000
"""Runs of the largest sweep: more are taken for a mistake."""


class Run(NamedTuple):
    """A run: what the objective is given."""

    settings: dict[str, Any]
    seed: int

    def __str__(self) -> str:
        return told({**self.settings, "seed": self.seed})


def told(settings: Mapping[str, Any]) -> str:
    """Settings in words: "r=8, form=additive"."""
    return ", ".join(f"{name}={text(value)}" for name, value in settings.items())


def names_of(runs: Iterable[Run]) -> list[str]:
    """The names of all settings, in the order of their first appearance."""
    return list(dict.fromkeys(name for run in runs for name in run.settings))


def key_of(run: Run, names: Iterable[str]) -> tuple[str, ...]:
    """What tells a run from the others of a table; a setting that the run lacks is empty."""
    settings = (text(run.settings[name]) if name in run.settings else "" for name in names)
    return (*settings, str(run.seed))


def expand(grid: Grid, seeds: Iterable[int] = (0,)) -> list[Run]:
    """All runs of a grid: every combination of the values with every seed, seeds outermost.

    Parameters
    ----------
    grid : mapping, or list of mappings
        Names of settings and a list of values for each. Several mappings are several grids, for settings that depend on
        others: ``[{"t": [1], "p": [1]}, {"t": [2, 4], "p": [1, 2]}]``. Values are what JSON can hold.
    seeds : iterable of int
        Seeds of every combination.

    Raises
    ------
    ValueError
        If a grid, a list or the seeds are empty, a value or a whole run occurs twice, or a name or value cannot be.
    """
    grids = [grid] if isinstance(grid, Mapping) else grid
    if not isinstance(grids, Sequence) or isinstance(grids, str) or not all(isinstance(one, Mapping) for one in grids):
        raise ValueError(f"a grid is a mapping from names to lists of values, or a list of such, got {_short(grid)}")
    if not grids or not all(grids):
        raise ValueError("the grid is empty: it names no setting" if not grids else "a part of the grid is empty")
    listed = [{_name(name): _values(name, values) for name, values in one.items()} for one in grids]
    chosen = _seeds(seeds)
    size = len(chosen) * sum(math.prod(map(len, one.values())) for one in listed)
    if size > MOST:
        raise ValueError(f"the grid has {size} runs, more than the {MOST} that a sweep may have")
    runs = [
        Run(dict(zip(one, values)), seed)
        for seed in chosen
        for one in listed
        for values in itertools.product(*one.values())
    ]
    names, seen = names_of(runs), set()
    for run in runs:
        key = key_of(run, names)
        if key in seen:
            raise ValueError(f"two parts of the grid hold the same run: {run}")
        seen.add(key)
    return runs


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip() or name != " ".join(name.split()):
        raise ValueError(f"settings have names of one line, got {name!r}")
    if name in RESERVED or name == "score":
        raise ValueError(f"no setting may be called {name!r}: a column of the results has that name")
    return name


def _values(name: str, values: Any) -> list[Any]:
    """The values of a setting in Python's own types."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"the values of {name!r} are a list, got {_short(values)}")
    found = [_plain(value) for value in values]
    if not found:
        raise ValueError(f"setting {name!r} has no values")
    texts: dict[str, Any] = {}
    for value in found:
        try:
            told, whole = text(value), finite(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"values are what JSON can hold, but one of {name!r} is {_short(value)}") from error
        if not whole or told == "":
            raise ValueError(f"values are finite and not empty, but one of {name!r} is {value!r}")
        if told in texts:
            same = "" if repr(texts[told]) == repr(value) else f" (as {texts[told]!r} and as {value!r})"
            raise ValueError(f"setting {name!r} has the value {told} twice{same}")
        texts[told] = value
    return found


def _seeds(seeds: Any) -> list[int]:
    if isinstance(seeds, (str, bytes, Mapping)) or not isinstance(seeds, Iterable):
        raise ValueError(f"seeds are a list of whole numbers, got {_short(seeds)}")
    found = [_plain(seed) for seed in seeds]
    wrong = [seed for seed in found if isinstance(seed, bool) or not isinstance(seed, int)]
    if wrong or not found:
        raise ValueError(f"seeds are whole numbers, at least one, got {_short(wrong[0]) if wrong else 'none'}")
    twice = next((seed for seed in found if found.count(seed) > 1), None)
    if twice is not None:
        raise ValueError(f"seed {twice} occurs twice")
    return found


def _plain(value: Any) -> Any:
    """A value of NumPy as Python's own."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:79]}…"
