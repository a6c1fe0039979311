"""The command ``python -m analysis sweep``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from analysis.sweeps.clusters import BACKENDS
from analysis.sweeps.driver import Plan, failures, plan, sweep
from analysis.sweeps.spec import function_of, objective_of, read_spec
from analysis.sweeps.work import ROW_FILE

EPILOG = f"""the file, YAML or JSON:
  objective: train.py                # a script, or a function as package.module:function
  grid:                              # every combination is run with every seed
    r: [2, 4, 8]
    k: [1, 2, 4]
    lr: [1e-3]
  seeds: [0, 1, 2]                   # default: [0]
  out: runs.csv                      # default: the name of this file, with .csv
  backend: loky                      # or threading, dask, ray; default: loky
  jobs: 4                            # runs at a time; default: 1, on a cluster all of it
  address: tcp://scheduler:8786      # of dask's scheduler or Ray's head; default: as configured, or started here
  check: train:check                 # module:function, called with each combination, raises ValueError for a bad one

settings that depend on others are a list of grids:
  grid:
    - {{method: [lora], r: [2, 4, 8]}}
    - {{method: [tucka], r: [4], k: [1, 2, 4]}}

the objective:
  A script is called as   python train.py --r 2 --k 1 --lr 0.001 --seed 0   and prints its results as a line of JSON,
  {{"score": 91.5, "parameters": 4096}}, or writes them to the file that ${ROW_FILE} names. A function takes the
  settings and the seed, and returns them. A number "score" is needed, higher is better. Paths are those of the current
  directory.

examples:
  python -m analysis sweep experts.yaml --dry-run
  python -m analysis sweep experts.yaml --jobs 4 --out runs.csv
  python -m analysis sweep experts.yaml --backend dask --address tcp://scheduler:8786
  python -m analysis figure expert-scaling --runs runs.csv -o scaling.pdf
"""


def add_command(commands: Any, **layout: Any) -> None:
    """Add the command and its options to a parser's commands."""
    parser = commands.add_parser(
        "sweep",
        help="run a grid of settings and seeds into a table",
        description="Do every run of a grid once, and keep a row of each in a CSV file as it ends. An interrupted "
        "sweep goes on where it was, a repeated one costs nothing, a failed run is a row with its error.",
        epilog=EPILOG,
        **layout,
    )
    parser.set_defaults(run=run_sweep)
    add = parser.add_argument
    add("spec", type=Path, metavar="SPEC", help="file ending in .yaml, .yml or .json that describes the sweep")
    add("-o", "--out", type=Path, metavar="FILE.csv", help="table of the runs")
    add("--jobs", type=_jobs, metavar="N", help="runs at a time, -1 for one on every core")
    add("--backend", choices=BACKENDS, help="where runs are done: processes or threads here, or a cluster")
    add("--address", metavar="ADDRESS", help="of dask's scheduler or Ray's head")
    add("--retry-failed", action="store_true", help="repeat runs whose row holds an error")
    add("--dry-run", action="store_true", help="check everything, say what is to do, and stop")


def run_sweep(args: argparse.Namespace) -> Path | str:
    """Run the sweep of a file, and give the path of its table; or what it would do.

    Raises
    ------
    ValueError
        If the sweep cannot be, or runs failed.
    """
    spec = read_spec(args.spec)
    given = {name: getattr(args, name) for name in ("out", "jobs", "backend", "address")}
    spec |= {name: value for name, value in given.items() if value is not None}
    what = dict(
        objective=objective_of(spec["objective"]),
        grid=spec["grid"],
        seeds=spec.get("seeds", (0,)),
        out=Path(spec.get("out", args.spec.with_suffix(".csv"))),
        check=function_of(spec["check"]) if "check" in spec else None,
        retry_failed=args.retry_failed,
    )
    where = dict(backend=spec.get("backend", "loky"), n_jobs=spec.get("jobs"), address=spec.get("address"))
    if args.dry_run:
        return _described(plan(**what), what["out"])
    sweep(**what, **where, progress=sys.stderr.isatty())
    failed = failures(plan(**{**what, "retry_failed": False}).table)
    if failed:
        raise ValueError(f"{failed}; the rows are in {what['out']}, and --retry-failed repeats the failed runs")
    return what["out"]


def _described(task: Plan, out: Path) -> str:
    runs, failed, todo = len(task.table.runs), len(task.failed), len(task.pending)
    there = runs - len([run for run in task.pending if run not in task.failed])
    lines = [f"{runs} runs, {there} of them in {out} ({failed} failed), {todo} to do"]
    shown = task.pending if todo <= 6 else task.pending[:5]
    lines += [f"  {run}" for run in shown]
    return "\n".join(lines if todo <= 6 else [*lines, f"  and {todo - 5} more"])


def _jobs(text: str) -> int:
    if not text.lstrip("-").isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a number of runs at a time, or -1, got {text!r}")
    return int(text)
