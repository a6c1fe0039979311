"""Budgeted ranks beside uniform ones: the same number of parameters, spread by `tucka.suggest_ranks` or evenly.

    python -m benchmarks.ranks --task digits8-conflict --seeds 5 --out docs/results/ranks.csv

Each row is a training run of TuckA's default at the learning rate given; the budget is what the uniform rank trains.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader

import analysis
import tucka
from tucka import TuckAConfig

from .arms import Arm
from .sizing import adapter_parameters
from .tasks import TASKS, Options, Task, task_of
from .training import calibration_batches, train_and_score


def config_of(task: Task, **fields: Any) -> TuckAConfig:
    """TuckA's default on the layers of a task."""
    return TuckAConfig(
        target_modules=list(task.target_modules), modules_to_save=list(task.modules_to_save) or None, **fields
    )


def uniform(task: Task, seed: int, r: int, fields: dict[str, Any]) -> TuckAConfig:
    """The same rank for every layer."""
    return config_of(task, r=r, **fields)


def budgeted(task: Task, seed: int, r: int, fields: dict[str, Any]) -> TuckAConfig:
    """Ranks that spend what the uniform rank spends."""
    config = uniform(task, seed, r, fields)
    budget = adapter_parameters(get_peft_model(task.base(), config_of(task, r=r, **fields)), task)
    batches = calibration_batches(task.rows.train, seed, "cpu")
    return tucka.suggest_ranks(task.base(), batches, budget=budget, config=config)


CHOICES: dict[str, Callable[..., TuckAConfig]] = {"uniform": uniform, "budgeted": budgeted}
"""How ranks are chosen."""


def run(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train and score one choice of ranks; a run of `analysis.sweep`."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    task = task_of(settings["task"], seed, Options(Path(settings["work"]), None, settings.get("samples")))
    fields = {"share_factors": settings["share_factors"]}
    config = CHOICES[settings["ranks"]](task, seed, settings["r"], fields)

    def build(base: nn.Module, task: Task, own: dict[str, Any], calibration: DataLoader) -> nn.Module:
        return tucka.apply(base, config, calibration=calibration, progress=False)

    arm = Arm(settings["ranks"], lambda task: {"r": settings["r"]}, build, (settings["lr"],), calibrated=True)
    row = train_and_score(task, arm, settings["lr"], seed)
    pattern = {name.rpartition(".")[2]: rank for name, rank in (config.rank_pattern or {}).items()}
    return {
        "parameters": row["adapter_parameters"],
        "validation": row["validation"],
        "score": row["test"],
        "rank_pattern": json.dumps(pattern, sort_keys=True),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("--task", choices=list(TASKS), default="digits8-conflict", help="task of the quality benchmark")
    add("--r", type=int, nargs="+", default=[6], help="uniform ranks (default: 6)")
    add("--share-factors", choices=("yes", "no"), default="yes", help="share factors between layers of one kind")
    add("--lr", type=float, default=0.004, help="learning rate (default: 0.004)")
    add("--seeds", type=int, default=5, help="how many seeds (default: 5)")
    add("--jobs", type=int, default=1, help="processes of one thread each (default: 1)")
    add("--work", default="out/quality", help="directory of pretrained weights (default: %(default)s)")
    add("--out", default="docs/results/ranks.csv", help="results (default: %(default)s)")
    args = parser.parse_args(argv)
    grid = {
        "task": [args.task],
        "ranks": list(CHOICES),
        "r": args.r,
        "lr": [args.lr],
        "share_factors": [args.share_factors == "yes"],
        "work": [args.work],
    }
    table = analysis.sweep(run, grid, range(args.seeds), out=args.out, n_jobs=args.jobs)
    means = table.groupby(["task", "share_factors", "r", "ranks"])[["parameters", "score"]].agg(["mean", "sem"])
    print(means.round(2).to_string())


if __name__ == "__main__":
    main()
