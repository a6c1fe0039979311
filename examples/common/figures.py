"""How methods compare, drawn: score against the parameters that their adapters train."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from common import results
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

import analysis
from analysis.styles import group_colors

OWN = ("tucka", "tucka-paper", "tucka-core")
"""Methods of this library, which are drawn filled."""

MARKERS = {
    "tucka": "o", "tucka-paper": "s", "tucka-core": "D", "lora": "^", "rslora": ">", "dora": "v", "vera": "P",
    "hra": "X", "oft": "*", "boft": "p", "full": "h",
}  # fmt: skip

COLORS = dict(zip(("tucka", "tucka-paper", "lora", "dora", "vera", "full", "tucka-core", "rslora"), group_colors(8)))


def compare(path: str | Path, example: str, out: str | Path, dataset: str | None = None) -> Path:
    """Draw the runs of an example from the table of results, see `draw`."""
    return draw(results.table(path, example, dataset), out)


def draw(table: pd.DataFrame, out: str | Path) -> Path:
    """Draw averages of runs, an axes for each dataset and model, and write them to a file.

    Parameters
    ----------
    table : DataFrame
        See `results.averages`.
    out : str or Path
        The figure; its ending says its format.
    """
    parts = list(table.groupby(["dataset", "model"], sort=False))
    # With a fixed salt and no date, equal numbers give equal files.
    dated = {"metadata": {"Date": None}} if Path(out).suffix == ".svg" else {}
    with analysis.style("notebook"), plt.rc_context({"svg.hashsalt": "examples"}):
        width, height = plt.rcParams["figure.figsize"]
        figure, axes = plt.subplots(1, len(parts), squeeze=False, figsize=(width * len(parts), height))
        for ax, ((dataset, model), part) in zip(axes[0], parts):
            trade(ax, part)
            ax.set_title(f"{dataset}, {model}")
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, **dated)
        plt.close(figure)
    return Path(out)


def trade(ax: Axes, table: pd.DataFrame) -> Axes:
    """Draw score against parameters: a mark for each method, with what its name sets, a line for the head alone."""
    for method, rows in table[table["parameters"] > 0].groupby(table["method"].str.partition(":")[0], sort=False):
        rows = rows.sort_values("parameters")
        color = COLORS.get(method, "#777777")
        face = color if method in OWN else "white"
        look = dict(color=color, marker=MARKERS.get(method, "o"), markerfacecolor=face, markersize=8, capsize=3)
        ax.errorbar(rows["parameters"], rows["score"], yerr=rows["error"].fillna(0), label=method, ls="none", **look)
        for row in rows.itertuples() if method in OWN else ():  # what others set is their size, which the axis tells
            own = row.method.partition(":")[2].replace(",", ", ")
            # A long label beside its point would run over other points.
            place = {"xytext": (0, 12), "ha": "center"} if "," in own else {"xytext": (8, 0), "va": "center"}
            place |= {"textcoords": "offset points", "fontsize": "small"}
            ax.annotate(own, (row.parameters, row.score), color=color, **place)
    for row in table[table["parameters"] == 0].itertuples():
        ax.axhline(row.score, color="0.35", linestyle="--", linewidth=1)
        ax.annotate("head alone", (0.01, row.score), xycoords=("axes fraction", "data"), va="bottom", color="0.35")
    seeds = table["seeds"].max()
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("parameters of the adapter, the head not counted")
    ax.set_ylabel(table["metric"].iloc[0] + (f", mean ± s.e. of {seeds} seeds" if seeds > 1 else ""))
    if ax.containers:
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="method")
    return ax
