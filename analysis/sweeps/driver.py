"""A sweep: the runs of a grid that a table does not hold yet, done in parallel."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from analysis.sweeps.backends import outcomes
from analysis.sweeps.clusters import check as check_backend
from analysis.sweeps.grid import Grid, Run, expand, names_of, told
from analysis.sweeps.table import SweepTable
from analysis.sweeps.work import ERROR, SEED, Objective, Script, one_line, perform

HELP_SECONDS = 60
"""How long a script may take to say which options it has."""


class Plan(NamedTuple):
    """What a sweep has to do.

    Attributes
    ----------
    objective : callable
        From settings and seed to results.
    table : SweepTable
        Where the rows are, and all runs of the grid.
    pending : list of Run
        Runs to do.
    failed : list of Run
        Runs whose row holds an error.
    """

    objective: Objective
    table: SweepTable
    pending: list[Run]
    failed: list[Run]


def sweep(
    objective: Objective | str | Path,
    grid: Grid,
    seeds: Iterable[int] = (0,),
    *,
    out: str | Path = "sweep.csv",
    backend: str = "loky",
    n_jobs: int | None = None,
    address: str | None = None,
    check: Callable[[dict[str, Any]], Any] | None = None,
    retry_failed: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Do every run of a grid once, and keep a row of each.

    Rows are written by this process as the runs end, so that an interrupted sweep goes on where it was, and one that is
    repeated costs nothing. A run that fails becomes a row with its error.

    Parameters
    ----------
    objective : callable or path
        ``objective(settings, seed)`` returns a mapping with a number ``score``, higher is better, and any other
        numbers, texts and truth values. Or a script, which is called as ``python SCRIPT --name value … --seed 0`` and
        prints its results as a line of JSON, see `analysis.sweeps.Script`.
    grid : mapping, or list of mappings
        Names of settings and the values of each; several mappings for settings that depend on others.
    seeds : iterable of int
        Seeds of every combination.
    out : str or Path
        The table, a CSV file with a row for each run. It may hold runs of other values of the same settings.
    backend : {"loky", "threading", "dask", "ray"}
        joblib's processes or threads on this machine, or a cluster. Workers of a cluster need joblib, cloudpickle and
        what the objective imports (a script has to be there at the same path), but no shared files otherwise.
    n_jobs : int, optional
        Runs at a time, -1 for one on every core; one by default, which is done in this process. On a cluster: by
        default all of it, and dask always uses all of a running cluster.
    address : str, optional
        Of dask's scheduler or the head of Ray. By default the one that is connected or configured
        (``distributed.Client``, ``DASK_SCHEDULER_ADDRESS``, ``ray.init``, ``RAY_ADDRESS``), else one is started here.
    check : callable, optional
        Called with every combination of settings before anything runs; raises ValueError or TypeError for one that
        cannot be.
    retry_failed : bool
        Whether to repeat runs whose row holds an error.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    DataFrame
        The rows of the grid's runs in its order: ``objective``, settings, ``seed``, results, ``seconds``, ``error``.

    Raises
    ------
    ValueError
        Before anything runs: if the grid, the seeds or a combination cannot be, if `out` holds something else, or the
        backend or the script cannot be used.

    Warns
    -----
    UserWarning
        If runs failed.

    Examples
    --------
    >>> from analysis import sweep
    >>> def objective(settings, seed):
    ...     return {"score": 100 - 30 / (settings["k"] * settings["t"]), "parameters": 64 * settings["k"]}
    >>> runs = sweep(objective, {"k": [1, 2, 4], "t": [1, 2]}, seeds=range(3), out="runs.csv")  # doctest: +SKIP
    """
    check_backend(backend, n_jobs, address)
    task = plan(objective, grid, seeds, out=out, check=check, retry_failed=retry_failed)
    if task.pending:
        _do(task, progress, backend=backend, n_jobs=n_jobs, address=address)
    frame = task.table.frame()
    failed = failures(task.table)
    if failed:
        warnings.warn(f"{failed}; retry_failed repeats them", stacklevel=2)
    return frame


def failures(table: SweepTable) -> str:
    """How many runs failed, and how the first of them did; nothing if none has."""
    rows = table.rows()
    found = [(run, row[ERROR]) for run in table.runs if (row := rows.get(table.key(run))) and row[ERROR]]
    if not found:
        return ""
    return f"{len(found)} of {len(table.runs)} runs failed, the first ({found[0][0]}) with {found[0][1]}"


def plan(
    objective: Objective | str | Path,
    grid: Grid,
    seeds: Iterable[int] = (0,),
    *,
    out: str | Path = "sweep.csv",
    check: Callable[[dict[str, Any]], Any] | None = None,
    retry_failed: bool = False,
) -> Plan:
    """Find out what a sweep has to do, and reject what it could not; arguments as those of `sweep`."""
    runs = expand(grid, seeds)
    function, name = _objective(objective)
    if check is not None:
        _check_all(check, [run for run in runs if run.seed == runs[0].seed])
    table = SweepTable(out, name, runs)
    rows = table.rows()
    failed = [run for run in runs if (row := rows.get(table.key(run))) and row[ERROR]]
    pending = [run for run in runs if table.key(run) not in rows]
    if retry_failed:
        pending += failed
    if pending and isinstance(function, Script):
        _check_options(function, [*names_of(runs), SEED])
    return Plan(function, table, pending, failed)


def _do(task: Plan, progress: bool, **where: Any) -> None:
    calls = [(run, (task.objective, *run)) for run in task.pending]
    total, failed = len(task.table.runs), 0
    with tqdm(total=total, initial=total - len(calls), unit="run", disable=not progress) as bar:
        for run, row in outcomes(perform, calls, **where):
            task.table.add(run, row)
            failed += bool(row.get(ERROR))
            bar.set_postfix({"failed": failed} if failed else {}, refresh=False)
            bar.update()


def _objective(objective: Any) -> tuple[Objective, str]:
    """An objective that can be called, and its name in the table."""
    if isinstance(objective, (str, Path)):
        path = Path(objective)
        if not path.is_file():
            raise ValueError(f"there is no script {objective}")
        if path.suffix != ".py" and not os.access(path, os.X_OK):
            raise ValueError(f"script {objective} is neither Python (.py) nor executable")
        return Script(str(path.resolve())), path.name
    if not callable(objective):
        raise ValueError(f"an objective is a function or the path of a script, got {objective!r}")
    named: Any = objective
    while getattr(named, "func", None) is not None:  # partial
        named = named.func
    module, name = getattr(named, "__module__", None), getattr(named, "__qualname__", type(named).__qualname__)
    return objective, f"{_module_name(str(module))}:{name}"


def _module_name(name: str) -> str:
    """The name of a module, also of the one that was started."""
    main = sys.modules.get("__main__")
    if name != "__main__" or main is None:
        return name
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    return spec.name if spec is not None else Path(file).stem if file else name


def _check_all(check: Callable[[dict[str, Any]], Any], runs: Iterable[Run]) -> None:
    for run in runs:
        try:
            check(copy.deepcopy(run.settings))
        except (ValueError, TypeError) as error:
            raise ValueError(f"the combination {told(run.settings)} cannot be: {error}") from error


def _check_options(script: Script, names: Iterable[str]) -> None:
    """Reject settings for which a script has no option, if its ``--help`` tells."""
    try:
        shown = subprocess.run(
            [*script.command, "--help"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=HELP_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return
    except OSError as error:
        raise ValueError(f"script {script.path} cannot be run: {error}") from error
    options = [word.strip("[](),|").partition("=")[0] for word in shown.stdout.split() if "--" in word]
    known = {option for option in options if option.startswith("--")} - {"--help", "--"}
    lacking = [f"--{name}" for name in names if f"--{name}" not in known]
    if shown.returncode == 0 and known and lacking:
        listed = one_line(", ".join(sorted(known)), 300)
        raise ValueError(f"{Path(script.path).name} has no option {', '.join(lacking)}; it has {listed}")
