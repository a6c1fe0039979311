"""Quality of adapters at their size: TuckA beside PEFT's methods, over tasks and seeds.

The learning rate of every arm is chosen on the validation split of a seed that enters no final score; then each arm is
trained at that learning rate on other seeds and scored on their test splits. Every run is a row of a CSV file,
written as it ends, and a run found there is not repeated.

    python -m benchmarks.quality run --tasks digits4-conflict --arms lora,tucka --seeds 0-4
    python -m benchmarks.quality table
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from joblib import Parallel, delayed

from .arms import ARM_NAMES, arm_of
from .results import COLUMNS, Store, key_of
from .selection import SELECTION_SEEDS, best_learning_rate, next_learning_rate
from .tasks import TASKS, Options, task_of
from .training import identity_of, train_and_score


class Job(NamedTuple):
    """A run to do, in words that can be sent to another process.

    Without a learning rate, it is the one that the selection runs in the store choose, among `rates` if given.
    """

    task: str
    arm: str
    seed: int
    learning_rate: float | None
    rates: tuple[float, ...] | None


class Common(NamedTuple):
    """What all runs share."""

    store: Store
    options: Options
    epochs: float | None
    device: str
    retry_failed: bool


class Plan(NamedTuple):
    """Which runs an arm gets on a task: learning rates to try (None: searched), and seeds to score it on."""

    rates: tuple[float, ...] | None
    selects: bool
    seeds: list[int]


def perform(job: Job, common: Common) -> dict[str, Any]:
    """Do a run and write its row, or find the row; an error becomes a row with its message."""
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    row: dict[str, Any] = {**job._asdict(), "settings": None, "epochs": common.epochs, "train_rows": None}
    try:
        task, arm = task_of(job.task, job.seed, common.options), arm_of(job.arm)
        row = identity_of(task, arm, job.learning_rate, job.seed, common.epochs)
        rows = common.store.rows()
        if job.learning_rate is None:
            row["learning_rate"] = best_learning_rate(rows, row, among=job.rates)
        found = next((found for found in rows if key_of(found) == key_of(row)), None)
        if found and not (found["error"] and common.retry_failed):
            return found
        rate = row["learning_rate"]
        row |= train_and_score(task, arm, rate, job.seed, epochs=common.epochs, device=common.device)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    common.store.append({name: value for name, value in row.items() if name in COLUMNS})
    return row


def study(task: str, arm: str, plan: Plan, common: Common) -> int:
    """Do the runs of an arm on a task, print a line as each ends, and return how many failed.

    First those that choose its learning rate, then those that score it.
    """
    torch.set_num_threads(1)  # pretraining included
    failed = 0
    for job in jobs_of(task, arm, plan, common):
        row = perform(job, common)
        failed += bool(row.get("error"))
        print(describe(row), flush=True)
    return failed


def jobs_of(task: str, arm: str, plan: Plan, common: Common) -> Iterator[Job]:
    """The runs of an arm on a task; in a search, the next learning rate follows from the runs before it."""
    if plan.selects:
        for rate in plan.rates or searched(task, arm, common):
            yield from (Job(task, arm, seed, rate, None) for seed in SELECTION_SEEDS)
    yield from (Job(task, arm, seed, None, plan.rates) for seed in plan.seeds)


def searched(name: str, text: str, common: Common) -> Iterator[float]:
    """Learning rates from the middle of the arm's outwards, as `selection.next_learning_rate` finds them."""
    arm = arm_of(text)
    middle = len(arm.learning_rates) // 2
    like = identity_of(task_of(name, SELECTION_SEEDS[0], common.options), arm, None, SELECTION_SEEDS[0], common.epochs)
    while rate := next_learning_rate(common.store.rows(), like, arm.learning_rates[middle - 1 : middle + 1]):
        yield rate


def describe(row: dict[str, Any]) -> str:
    """One line on a run."""
    head = f"{row['task']} {row['arm']} seed {row['seed']}, learning rate {row['learning_rate']}"
    if row.get("error"):
        return f"{head}: {row['error']}"
    nmi = "" if row.get("nmi") in (None, "") else f", nmi {float(row['nmi']):.2f}"
    scores = f"validation {float(row['validation']):.2f}, test {float(row['test']):.2f}"
    return f"{head}: {scores}{nmi}, {row['adapter_parameters']} parameters, {row['cpu_seconds']} s"


def run(args: argparse.Namespace) -> int:
    """Select learning rates, then score; the exit status tells whether a run failed."""
    options = Options(args.work, args.sections, args.samples)
    common = Common(Store(args.out), options, args.epochs, args.device, args.retry_failed)
    plan = Plan(args.lrs, not args.final, [] if args.only_select else args.seeds)
    # An arm's runs follow one another in one process; the arms share the processes.
    parallel = Parallel(args.workers, batch_size=1, pre_dispatch=args.workers)
    pairs = itertools.product(args.tasks, args.arms)
    failed = sum(parallel(delayed(study)(task, arm, plan, common) for task, arm in pairs))
    return min(failed, 1)


def table(args: argparse.Namespace) -> int:
    """Write the tables and the figures."""
    from . import report

    print(report.write(Store(args.out).rows(), args.report))
    return 0


def names(text: str) -> list[str]:
    """Read names separated by commas; a comma inside an arm's settings is one that a name=value follows."""
    parts: list[str] = []
    for part in text.split(","):
        if parts and ":" in parts[-1] and "=" in part and ":" not in part.partition("=")[0]:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


def known(choices: Iterable[str]):
    """A reader of names that refuses unknown ones."""

    def read(text: str) -> list[str]:
        found = list(choices) if text == "all" else names(text)
        for name in found:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(choices)}")
        return found

    return read


def arms(text: str) -> list[str]:
    """Read names of arms, with or without settings."""
    found = names(text)
    for name in found:
        try:
            arm_of(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return found


def seeds(text: str) -> list[int]:
    """Read "0-4" or "0,2,7"."""
    ranges = [part.partition("-") for part in text.split(",")]
    found = [seed for first, _, last in ranges for seed in range(int(first), int(last or first) + 1)]
    if set(found) & set(SELECTION_SEEDS):
        raise argparse.ArgumentTypeError(f"seeds {SELECTION_SEEDS} only select learning rates, got {text}")
    return found


def rates(text: str) -> tuple[float, ...]:
    """Read learning rates."""
    return tuple(float(part) for part in text.split(","))


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__, formatter_class=shown)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="do the runs that the results lack", formatter_class=shown)
    one.set_defaults(command=run)
    add = one.add_argument
    add("--tasks", type=known(TASKS), default=list(TASKS), help=f"default: all of {', '.join(TASKS)}")
    add("--arms", type=arms, required=True, help=f"of {', '.join(ARM_NAMES)}; or with settings, tucka:k=8,alpha=2.0")
    add("--seeds", type=seeds, default=seeds("0-4"), help="seeds of the final scores, as 0-4 or 0,2 (default: 0-4)")
    add("--lrs", type=rates, help="learning rates to choose from (default: searched from the middle of the arm's)")
    stages = one.add_mutually_exclusive_group()
    stages.add_argument("--only-select", action="store_true", help="stop after the selection of learning rates")
    stages.add_argument("--final", action="store_true", help="select among the selection runs already there")
    add("--work", type=Path, default=Path("out/quality"), help="pretrained weights, text (default: %(default)s)")
    add("--sections", type=Path, help="sections.json.gz, for the task sections")
    add("--samples", type=int, help="cap on the samples of a task, for tests (default: the task's)")
    add("--epochs", type=float, help="passes over the training samples (default: the task's)")
    add("--workers", type=int, default=1, help="processes, of one thread each (default: 1)")
    add("--device", default="cpu", help="where to train (default: cpu)")
    add("--retry-failed", action="store_true", help="repeat runs whose row holds an error")
    two = commands.add_parser("table", help="write tables and figures")
    two.set_defaults(command=table)
    two.add_argument("--report", type=Path, default=Path("docs/results"), help="directory (default: %(default)s)")
    for command in (one, two):
        out = Path("benchmarks/results/quality.csv")
        command.add_argument("--out", type=Path, default=out, help="the results (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    args = read_arguments(argv)
    return args.command(args)


if __name__ == "__main__":
    sys.exit(main())
