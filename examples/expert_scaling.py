"""How the score grows with the number of experts, K groups of T each, and what the experts cost.

1. A model is adapted anew for every K, T and seed: a sweep (`analysis.sweep`) that does several runs at a time, writes
   a row as each ends, and goes on where it was interrupted.
2. A power law with a floor is fitted to the scores (`analysis.fit_power_law`): its power says how fast more experts
   help, its floor what they cannot mend, and its flags when neither is to be believed.
3. The figure: the scores with their laws, and the parameters that all experts together train, beside those of as many
   LoRAs of the same rank.

Other methods (--method) have no experts: beside every number of them they train at least as many parameters.

    python examples/expert_scaling.py                                  # digits: under five minutes on two cores
    python examples/expert_scaling.py --k 1 2 4 8 16 32 --t 1 2 4 --seed 0 1 2 3 4 --jobs -1
    python examples/expert_scaling.py --method tucka lora --dataset arithmetic --output out/scaling-arithmetic

The datasets are the offline ones of the other examples, cut short
so that a run takes seconds: scores are those of a short training.
"""

from __future__ import annotations

import argparse
import io
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from common import results, study
from common.methods import method_of
from common.options import begin, read
from common.short import cut, short_parser, task_of

import analysis
from analysis import PowerLaw

EXAMPLE = "expert_scaling"

FIXED = ("dataset", "model", "samples", "epochs", "batch_size", "learning_rate", "r", "alpha", "bf16")
"""What else changes a result: columns of the sweep's table."""


def run(settings: dict[str, Any], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Adapt, score and save one model, as a run of the sweep; its row goes into the common table as well."""
    args = begin(argparse.Namespace(**{**vars(args), **settings}))
    task = task_of(args, seed)
    key = study.key_of(EXAMPLE, args, task, study.shapes_of(task), settings["method"], seed)
    if results.found(args.results, key) is None:
        with redirect_stderr(io.StringIO()):  # the sweep has a bar of its own, which those of its runs would break
            study.run(args, task, settings["method"], key)
    row = results.found(args.results, key)
    sizes = {"experts": settings["k"] * settings["t"], "parameters": int(row["adapter_parameters"])}
    return {**sizes, **{name: float(row[name]) for name in ("score", "validation", "cpu_seconds")}}


def grid_of(args: argparse.Namespace) -> list[dict[str, list[Any]]]:
    """Every K with every T, all else being equal; P = T, so that the experts of a group are independent.

    Methods without experts are as large as TuckA with the first T.
    """
    held = {name: [getattr(args, name)] for name in FIXED}
    grids = []
    for method in args.method:
        ts = args.t if method_of(method)[0].is_tucka else args.t[:1]
        grids += [{**held, "method": [method], "k": args.k, "t": [t], "p": [t]} for t in ts]
    return grids


def named(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs, and the series that each is in: TuckA's T, or a method."""
    names = []
    for method, t in zip(runs["method"], runs["t"]):
        parts = ([] if method == "tucka" else [method]) + ([f"t={t}"] if method_of(method)[0].is_tucka else [])
        names.append(", ".join(parts))
    return runs.assign(series=names)


def fitted(runs: pd.DataFrame) -> dict[str, PowerLaw]:
    """Fit the scores of TuckA with every T against K·T, and print the laws."""
    laws, refused = analysis.fit_laws(runs[runs["method"] == "tucka"], "experts", by="series")
    print("\nscore = 100 − a · (K·T)^(−b) − c")
    for name, law in laws.items():
        low, high = law.intervals()["b"]
        print(f"{name}: b = {law.b:.2f} ({low:.2f} to {high:.2f}), approaching {100 - law.c:.1f}")
        print("".join(f"     {flag}\n" for flag in law.flags), end="")
    print("".join(f"{name}: no law, {reason}\n" for name, reason in refused.items()), end="")
    return laws


def parameters_of(runs: pd.DataFrame, args: argparse.Namespace) -> pd.DataFrame:
    """Tabulate the parameters of all Tucker experts, and of a LoRA of their rank for every expert."""
    lora = analysis.count(study.shapes_of(task_of(args, args.seed[0])), "lora", r=args.r).total
    sizes = runs.drop_duplicates(["series", "experts"])
    lines = [
        (f"TuckA, {series}" if method == "tucka" else series, experts, own)
        for method, series, experts, own in zip(
            *(sizes[name] for name in ("method", "series", "experts", "parameters"))
        )
    ]
    lines += [(f"a LoRA of rank {args.r} per expert", experts, experts * lora) for experts in set(sizes["experts"])]
    return pd.DataFrame(lines, columns=["method", "x", "parameters"])


def draw(runs: pd.DataFrame, laws: dict[str, PowerLaw], parameters: pd.DataFrame, path: Path) -> None:
    """Draw the scores with their laws (left) and the parameters (right)."""
    with analysis.style("notebook", width="slide"):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
        counts = [analysis.expert_counts(part).assign(series=name) for name, part in runs.groupby("series", sort=False)]
        analysis.plots.expert_scaling(pd.concat(counts), ax=left)
        if laws:
            # Laws take the colours of the curves by their order.
            tables = [law.table().assign(series=name) for name, law in laws.items()]
            analysis.plots.fitted_law(pd.concat(tables), ax=left)
        left.set_title("score (dashed: power law with 95 % band)")
        analysis.plots.parameter_scaling(parameters, against="experts", ax=right)
        right.set_title("trained parameters")
        figure.savefig(path)
        plt.close(figure)


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = short_parser(__doc__, EXAMPLE)
    add = parser.add_argument_group("the sweep").add_argument
    add("--k", nargs="+", type=int, default=[1, 2, 4, 8, 16], metavar="K", help="groups (default: 1 2 4 8 16)")
    add("--t", nargs="+", type=int, default=[1, 2], metavar="T", help="experts in a group (default: 1 2)")
    add("--jobs", type=int, default=2, help="runs at a time, -1 for one on every core (default: %(default)s)")
    parser.set_defaults(seed=[0, 1], r=4)
    return cut(read(parser, argv))


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Run the example; the table of the sweep."""
    args = read_arguments(argv)
    table, picture = args.output / "runs.csv", args.output / "scaling.png"
    task_of(args, args.seed[0])  # what is made once, is made before several want it
    runs = analysis.sweep(partial(run, args=args), grid_of(args), args.seed, out=table, n_jobs=args.jobs)
    runs = named(runs[runs["score"].notna()])
    means = runs.groupby(["series", "k"])[["parameters", "score"]].agg(
        {"parameters": "first", "score": ["mean", "sem"]}
    )
    print(f"\n{means.round(2).to_string()}")
    draw(runs, fitted(runs), parameters_of(runs, args), picture)
    print(f"\nruns:     {table}\nresults:  {args.results}\nfigure:   {picture}\nadapters: {args.output}/*/adapter")
    return runs


if __name__ == "__main__":
    main()
