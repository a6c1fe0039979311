"""How the groups share the samples while training goes on."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.plots._frame import axes_or_new, checked, group_palette, say_no_values, show_groups
from analysis.plots._lines import MARK, percent, sparse, thin
from analysis.styles import PALETTE


def load_over_time(history: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw every group's share of the samples against the training step, and the share of even loads.

    Parameters
    ----------
    history : DataFrame
        Columns step (optimiser steps), group and share (of 1), one row for each step and group. A group without
        samples has rows with share 0, for the ideal 1/K counts the groups of the table.
    ax : Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        A line with some markers for each group, then the dashed line at 1/K; shares in percent, from 0.

    Raises
    ------
    ValueError
        If columns or rows are missing, a step and group occur twice, or a share lies outside [0, 1].
    """
    history = checked("history", history, ["group"], ["step", "share"], unique=["step", "group"])
    outside = history["share"][(history["share"] < 0) | (history["share"] > 1 + 1e-6)]
    if len(outside):
        raise ValueError(f"column 'share' of history lies in [0, 1], found {outside.iloc[0]:g}")
    ax = axes_or_new(ax)
    ax.set(xlabel="training step", ylabel="share of samples")
    if history[["step", "share"]].isna().any(axis=1).all():
        say_no_values(ax)
        return ax
    palette, lines = group_palette(history["group"]), []
    k = len(palette)
    for index, (group, color) in enumerate(palette.items()):
        rows = history[history["group"] == group].dropna().sort_values("step")
        look = sparse(index, len(rows)) if k <= len(PALETTE) else dict(linewidth=thin())
        lines += ax.plot(rows["step"], rows["share"], color=color, **look)
    ideal = ax.axhline(1 / k, color=MARK, linestyle="--", linewidth=thin(0.9), label=f"even: 1/{k}")
    top = np.nanmax(history["share"])
    ax.set_ylim(0, min(1.02, 1.08 * max(top, 1 / k)))
    percent(ax.yaxis)
    ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    show_groups(ax, palette, lines, [ideal])
    return ax
