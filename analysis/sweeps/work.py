"""What a run does where it runs.

Workers receive these functions by value, so a machine that helps with a sweep needs joblib and what the objective
needs, but not this package. For that, nothing here may use more than Python's own library.
"""

from __future__ import annotations

import copy
import json
import math
import operator
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Objective = Callable[[dict[str, Any], int], Mapping[str, Any]]
"""From settings and a seed to named numbers, among them a score."""

ROW_FILE = "TUCKA_SWEEP_ROW"
"""Environment variable with the path of a file to which a script may write its row."""

OBJECTIVE, SEED, SCORE, SECONDS, ERROR = "objective", "seed", "score", "seconds", "error"
RESERVED = (OBJECTIVE, SEED, SECONDS, ERROR)
"""Columns of the table that neither settings nor results may be called."""


class Script:
    """A script as an objective: a process with ``--name value`` options for the settings and the seed.

    It prints its row, a JSON object, as a line of its output (the last such line counts), or writes it to the file that
    the environment variable `ROW_FILE` names. ``None`` leaves an option out, true and false are words, a list becomes
    several words and a mapping JSON.

    Parameters
    ----------
    path : str
        The script. Python runs a ``.py``; anything else is executed itself.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def command(self) -> list[str]:
        """What starts the script, without options."""
        return [sys.executable, self.path] if self.path.endswith(".py") else [self.path]

    def __call__(self, settings: dict[str, Any], seed: int) -> dict[str, Any]:
        """Run the script once."""
        words = [word for name, value in {**settings, SEED: seed}.items() for word in _option(name, value)]
        with tempfile.TemporaryDirectory() as directory:
            row_file = Path(directory) / "row.json"
            done = subprocess.run(
                [*self.command, *words],
                env={**os.environ, ROW_FILE: str(row_file)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
            )
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing on standard error"]
                raise RuntimeError(f"{Path(self.path).name} ended with status {done.returncode}: {said[-1].strip()}")
            lines = [row_file.read_text(encoding="utf-8")] if row_file.exists() else done.stdout.splitlines()
        for line in reversed(lines):
            row = _json_object(line)
            if row is not None:
                return row
        raise ValueError(f"{Path(self.path).name} neither printed a JSON object as a line nor wrote one to ${ROW_FILE}")


def perform(objective: Objective, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Do a run: its results and how long it took, or its error in one line."""
    started = time.perf_counter()
    try:
        # A copy, for an objective may change what it is given.
        row = checked(objective(copy.deepcopy(settings), seed), settings, seed)
    except (Exception, SystemExit) as error:
        row = {ERROR: one_line(f"{type(error).__name__}: {error}")}
    return {**row, SECONDS: round(time.perf_counter() - started, 3)}


def numbered(function: Callable[..., Any], number: int, arguments: tuple[Any, ...]) -> tuple[int, Any]:
    """Call a function, and give its result with the number of the call."""
    return number, function(*arguments)


def checked(found: Any, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The results of an objective as plain values, without the settings that it may repeat.

    Raises
    ------
    TypeError, ValueError
        If there is no score that is a number, a value is none, or a name means something else in the table.
    """
    if not isinstance(found, Mapping):
        raise TypeError(f"an objective returns a mapping with a score, got {type(found).__name__}")
    given = {**settings, SEED: seed}
    row = {}
    for name, value in found.items():
        if name in given:
            if text(plain(name, value)) != text(given[name]):
                raise ValueError(f"result {name!r} is {value!r}, but the run's setting of that name {given[name]!r}")
        elif name in RESERVED or not isinstance(name, str) or not name.strip():
            raise ValueError(f"a result may not be called {name!r}")
        else:
            row[name] = plain(name, value)
    score = row.get(SCORE)
    if isinstance(score, (bool, str)) or score is None:
        raise ValueError(f"the results hold no number {SCORE!r}; they are {', '.join(map(str, found)) or 'empty'}")
    return row


def plain(name: str, value: Any) -> bool | int | float | str | None:
    """A number of NumPy's, torch's or Python's as Python's; text, truth values and nothing as they are."""
    if value is None or isinstance(value, (bool, str)):
        return value
    for convert in (operator.index, float):
        try:
            return convert(value)
        except (TypeError, ValueError, RuntimeError):
            continue
    raise TypeError(f"result {name!r} is no number: {one_line(repr(value), 80)}")


def text(value: Any) -> str:
    """A setting as the table holds it: the same text for what is equal, so 4 and 4.0 are one setting."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def finite(value: Any) -> bool:
    """Whether a setting holds no number that is not finite, which would not equal itself."""
    if isinstance(value, (list, tuple)):
        return all(map(finite, value))
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)


def one_line(message: str, most: int = 500) -> str:
    """Text without line breaks, cut if it is long."""
    line = " ".join(message.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _option(name: str, value: Any) -> list[str]:
    """An option of a command line and its value; one that starts with a dash is joined to the name."""
    if value is None:
        return []
    words = [text(each) for each in (value if isinstance(value, (list, tuple)) else [value])]
    if len(words) == 1 and words[0].startswith("-"):
        return [f"--{name}={words[0]}"]
    return [f"--{name}", *words]


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line) if line.lstrip().startswith("{") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
