"""Figures of the quality benchmark."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter


class Mark(NamedTuple):
    """How the points of some arms are drawn."""

    label: str
    color: str
    marker: str
    size: float = 7


# Okabe and Ito's colours, which any colour vision tells apart; methods of one colour differ in their markers.
MARKS: dict[str, Mark] = {
    r"tucka": Mark("TuckA", "#0072B2", "*", 15),
    r"tucka-paper": Mark("TuckA, paper preset", "#56B4E9", "*", 12),
    r"tucka[-:].*": Mark("TuckA, other settings", "#56B4E9", "."),
    r"lora\d*": Mark("LoRA", "#D55E00", "o"),
    r"rslora": Mark("rsLoRA", "#E69F00", "s"),
    r"dora": Mark("DoRA", "#E69F00", "D"),
    r"eva": Mark("EVA", "#E69F00", "^"),
    r"vera": Mark("VeRA", "#009E73", "v"),
    r"hra": Mark("HRA", "#009E73", "P"),
    r"oft": Mark("OFT", "#009E73", "X"),
    r"lily": Mark("Lily", "#CC79A7", "p"),
    r"miss": Mark("MiSS", "#CC79A7", "h"),
    r"full": Mark("full fine-tuning", "#000000", "d"),
}
"""The first pattern that matches a whole name of an arm says how it is drawn; PEFT arms with own settings included."""

COLUMNS = 3


def mark_of(arm: str) -> Mark | None:
    """How an arm is drawn, or None if it has no size to be drawn at."""
    name = arm if arm.startswith("tucka") else arm.partition(":")[0]
    return next((mark for pattern, mark in MARKS.items() if re.fullmatch(pattern, name)), None)


def plot_scores(scores: pd.DataFrame, title: str, ax: Axes) -> Axes:
    """Draw score against adapter parameters for the arms of one task.

    Parameters
    ----------
    scores : DataFrame
        From `report.final_scores`.
    title : str
        Name of the task.
    ax : Axes
        Where to draw.
    """
    for row in scores[scores["arm"] == "frozen"].itertuples():
        ax.axhline(row.score, color="#777777", linestyle=":", label="frozen, head alone", zorder=0)
    loras = scores[scores["arm"].str.fullmatch(r"lora\d*")].sort_values("parameters")
    ax.plot(loras["parameters"], loras["score"], color=MARKS[r"lora\d*"].color, linewidth=1, alpha=0.6, zorder=1)
    for row in scores.itertuples():
        mark = mark_of(row.arm)
        if mark is not None and row.parameters > 0:
            ax.errorbar(
                row.parameters,
                row.score,
                row.error if pd.notna(row.error) else None,
                fmt=mark.marker,
                color=mark.color,
                markersize=mark.size,
                markeredgecolor="white",
                markeredgewidth=0.5,
                elinewidth=1,
                label=mark.label,
            )
    ax.set(title=title, xscale="log", xlabel="adapter parameters", ylabel="test score (%)")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.25)
    return ax


def draw_scores(scores: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw a panel per task, with one legend below all."""
    columns = min(COLUMNS, len(scores))
    lines = -(-len(scores) // columns)
    figure = Figure(figsize=(max(4.6 * columns, 7), 3.6 * lines + 1.2), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax, (task, table) in zip(axes, scores.items()):
        plot_scores(table, task, ax)
    for ax in axes[len(scores) :]:
        ax.set_axis_off()
    handles = {}
    for ax in axes:
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels()) if label not in handles}
    order = [label for label in ("frozen, head alone", *(mark.label for mark in MARKS.values())) if label in handles]
    figure.legend([handles[label] for label in order], order, loc="outside lower center", ncols=5, frameon=False)
    return figure
