"""How to choose ranks: look at spectra, have a budget spread before the training, or truncate after it.

1. Multilinear spectra of the calibration tensors (`tucka.ranks.spectra`): how many directions each layer needs, before
   anything is trained.
2. For several budgets, one rank for all layers beside the ranks `tucka.suggest_ranks` finds for as many parameters.
3. The largest of these adapters, truncated to the smaller budgets (`tucka.truncate`): scored as it is, and after one
   more epoch at a quarter of the learning rate.
4. The figure: the spectra with suggested ranks, and score against parameters; beside them other methods (--method) that
   train at least as many.

    python examples/rank_selection.py                                   # digits: minutes on one core
    python examples/rank_selection.py --method tucka lora --ranks 2 4 8 16 --dataset docstrings --seed 0 1 2

The datasets are the offline ones of the other examples, cut short
so that a run takes seconds: scores are those of a short training. Runs that are in the table are not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from common import results, study
from common.methods import METHODS
from common.options import read
from common.short import cut, short_parser, task_of
from common.study import Task
from common.training import train
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from peft import PeftModel
from transformers import set_seed

import analysis
import tucka
from analysis.parameters import tucka_rank
from analysis.styles import PALETTE
from tucka import TuckAConfig
from tucka.ranks import Spectra

EXAMPLE = "rank_selection"

UNIFORM, SUGGESTED, TRUNCATED, RECOVERED = "one rank", "suggested", "truncated", "truncated, one more epoch"

FULL = dict(block_size=None, axis_block_size=None, trainable="all", init_experts="gradient")
"""Full cores between factors that all train: their ranks are what parameters, spectra and truncation go by."""


def config_of(args: argparse.Namespace, task: Task, **fields: Any) -> TuckAConfig:
    """Make the configuration that ranks are chosen for."""
    layers = dict(target_modules=list(task.targets), modules_to_save=list(task.heads) or None, task_type=task.task_type)
    return TuckAConfig(**{**FULL, **study.fields_for(args, task, "tucka")["fields"], **layers, **fields})


def trained(args: argparse.Namespace, task: Task, seed: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Adapt with some ranks, unless that is in the table; returns its row, and where the adapter lies."""
    task = replace(task, fields={"tucka": {**FULL, **task.fields.get("tucka", {}), **fields}})
    key = study.key_of(EXAMPLE, args, task, study.shapes_of(task), "tucka", seed)
    if results.found(args.results, key) is None:
        study.run(args, task, "tucka", key)
    row = results.found(args.results, key)
    return {**row, "key": key, "adapter": study.directory_of(args, key) / "adapter"}


def truncated(
    args: argparse.Namespace, task: Task, of: Mapping[str, Any], budget: int, further: float
) -> dict[str, str]:
    """Truncate a trained adapter to a budget and train it for further epochs, unless that is in the table."""
    recipe = study.recipe_for(args, task, "tucka")
    recipe = replace(recipe, epochs=further, learning_rate=recipe.learning_rate / 4)
    key = {**of["key"], "settings": {**of["key"]["settings"], "truncated_to": budget, "further_epochs": further}}
    if results.found(args.results, key) is None:
        set_seed(key["seed"])
        # What is loaded to be used has nothing that trains, so that without further epochs none is done.
        model = PeftModel.from_pretrained(task.base(), of["adapter"], is_trainable=further > 0)
        report = tucka.truncate(model, budget=budget)
        directory = study.directory_of(args, key)
        title = f"truncated to {report.parameters:,}"
        how = dict(recipe=recipe, seed=key["seed"], run=directory, collate=task.collate, measure=task.measure)
        trainer = train(model, task.train, args, title, **how)
        heads = int(of["trainable_parameters"]) - int(of["adapter_parameters"])
        sizes = {"adapter_parameters": report.parameters, "trainable_parameters": report.parameters + heads}
        scores = {"validation": task.score(trainer, task.validation), "score": task.score(trainer, task.test)}
        study.save(trainer, directory / "adapter")
        rounded = {name: round(value, 4) for name, value in scores.items()}
        results.append(args.results, {**key, **sizes, "metric": task.metric, **rounded})
    return results.found(args.results, key)


def others(args: argparse.Namespace, task: Task, seed: int, rank: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Adapt with the other methods as many parameters as with one rank, unless that is in the table; names and rows."""
    ours = [name for name, method in METHODS.items() if method.is_tucka]
    task = replace(task, fields={**task.fields, **{name: {**task.fields.get(name, {}), "r": rank} for name in ours}})
    for method in args.method:
        if method != "tucka":
            key = study.key_of(EXAMPLE, args, task, study.shapes_of(task), method, seed)
            if results.found(args.results, key) is None:
                study.run(args, task, method, key)
            yield method, results.found(args.results, key)


def compared(args: argparse.Namespace, task: Task, seed: int) -> tuple[list[dict[str, Any]], Spectra, dict[str, int]]:
    """Do the runs of a seed; returns their scores, the spectra, and the ranks suggested for the largest budget."""
    base, shapes = task.base(), study.shapes_of(task)
    batches = study.calibration_batches(task, study.recipe_for(args, task, "tucka").batch_size, seed)
    spectra = tucka.ranks.spectra(base, batches, config=config_of(args, task))
    lines: list[dict[str, Any]] = []

    def note(how: str, budget: int, row: Mapping[str, Any]) -> None:
        sizes = {"budget": budget, "parameters": int(row["adapter_parameters"])}
        lines.append({"ranks": how, **sizes, "score": float(row["score"])})

    budgets = []
    for rank in sorted(args.ranks):
        budgets.append(analysis.count(shapes, "tucka", config=config_of(args, task, r=rank)).total)
        whole = trained(args, task, seed, {"r": rank})
        note(UNIFORM, budgets[-1], whole)
        suggested = tucka.suggest_ranks(base, batches, budget=budgets[-1], config=config_of(args, task))
        note(SUGGESTED, budgets[-1], trained(args, task, seed, {"rank_pattern": suggested.rank_pattern}))
        for method, row in others(args, task, seed, rank):
            note(method, budgets[-1], row)
    for budget in budgets[:-1]:
        note(TRUNCATED, budget, truncated(args, task, whole, budget, further=0.0))
        note(RECOVERED, budget, truncated(args, task, whole, budget, further=1.0))
    return lines, spectra, {shape.name: tucka_rank(shape, suggested) for shape in shapes}


def table_of(spectra: Spectra) -> pd.DataFrame:
    """Tabulate spectra for `analysis.plots.spectrum`."""
    lines = [
        (line.layer, mode, index, float(value))
        for line in spectra.layers
        for mode, values in line.values.items()
        for index, value in enumerate(values, 1)
    ]
    return pd.DataFrame(lines, columns=["layer", "mode", "index", "value"])


def draw_scores(ax: Axes, means: pd.DataFrame) -> None:
    """Draw score against parameters, a line for each way to choose."""
    ways = dict.fromkeys((UNIFORM, SUGGESTED, TRUNCATED, RECOVERED, *means["ranks"]))
    looks = dict(zip(ways, zip(cycle(PALETTE), cycle("os^vDPX*"))))
    for how, (color, marker) in looks.items():
        rows = means[means["ranks"] == how].sort_values("parameters")
        ax.errorbar(
            rows["parameters"], rows["score"], rows["error"].fillna(0), color=color, marker=marker, capsize=3, label=how
        )
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
    seeds = means["seeds"].max()
    ax.set(xlabel="parameters of the adapter, the head not counted", ylabel="score (%)", title="score against size")
    if seeds > 1:
        ax.set_ylabel(f"score (%), mean ± s.e. of {seeds} seeds")
    ax.legend(title="ranks, or method")


def draw(spectra: Spectra, ranks: Mapping[str, int], means: pd.DataFrame, path: Path) -> None:
    """Draw the spectra with the ranks suggested (left) and the scores (right)."""
    with analysis.style("notebook", width="slide"):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.5), width_ratios=[1.2, 1])
        table = table_of(spectra)
        # Beyond twice the largest rank there is nothing to choose.
        table = table[table["index"] <= 2 * max(ranks.values())]
        analysis.plots.spectrum(table, mode="input", chosen=ranks, ax=left)
        left.set_title(f"{spectra.tensor} tensor of every layer")
        draw_scores(right, means)
        figure.savefig(path)
        plt.close(figure)


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = short_parser(__doc__, EXAMPLE, "--r")
    text = "ranks whose numbers of parameters are the budgets (default: 2 4 8)"
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8], metavar="R", help=text)
    return cut(read(parser, argv))


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Run the example; the mean score of every way to choose ranks, by size."""
    args = read_arguments(argv)
    lines: list[dict[str, Any]] = []
    for seed in args.seed:
        own, spectra, ranks = compared(args, task_of(args, seed), seed)
        lines += own
    print(f"\n{spectra}\n")
    runs = pd.DataFrame(lines).groupby(["ranks", "budget"], sort=False)
    # A budget that is spread is not met to the last parameter, nor alike by all seeds.
    means = runs.agg(
        parameters=("parameters", "mean"), score=("score", "mean"), error=("score", "sem"), seeds=("score", "count")
    ).reset_index()
    print(means.round(2).to_string(index=False))
    picture = args.output / "ranks.png"
    draw(spectra, ranks, means, picture)
    print(f"\nresults:  {args.results}\nfigure:   {picture}\nadapters: {args.output}/*/adapter")
    return means


if __name__ == "__main__":
    main()
