"""How far the experts move the activations of every layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots._frame import (
    axes_or_new,
    checked,
    group_palette,
    name_ticks,
    say_no_values,
    short_layers,
    show_groups,
)
from analysis.plots._lines import MARK, MARKERS, percent, thin
from analysis.styles import PALETTE

_MOST_BARS = 12
"""Layers up to this number show ranges as bars side by side; more show them as bands."""


def activation_movement(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the relative movement ‖x'−x‖/‖x‖ of the activations, for every layer and group.

    Parameters
    ----------
    table : DataFrame
        Columns layer, group, expert and movement (of 1), one row for each.
    ax : Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        A line with markers for each group over the layers in the order of the table, at the mean over the group's
        experts; bars, or bands beyond twelve layers, from the least to the greatest expert, for up to eight groups.
        Movements in percent.

    Raises
    ------
    ValueError
        If columns or rows are missing, an expert occurs twice, or a movement is negative.
    """
    keys = ["layer", "group", "expert"]
    table = checked("table", table, keys, ["movement"], unique=keys)
    if (table["movement"] < 0).any():
        raise ValueError(f"column 'movement' of table is 0 or more, found {table['movement'].min():g}")
    layers = list(dict.fromkeys(table["layer"]))
    ax = axes_or_new(ax)
    few = table["group"].nunique() <= len(PALETTE)
    ax.set(xlabel="layer", ylabel="movement\n‖x′−x‖ / ‖x‖")
    if table["movement"].isna().all():
        say_no_values(ax)
        return ax
    palette, lines = group_palette(table["group"]), []
    offsets = np.zeros(len(palette))
    if len(layers) <= _MOST_BARS and few:
        offsets = (np.arange(len(palette)) - (len(palette) - 1) / 2) * 0.6 / len(palette)
    for (group, color), offset, marker in zip(palette.items(), offsets, MARKERS * len(palette)):
        rows = table[table["group"] == group].groupby("layer")["movement"]
        mean, low, high = (rows.agg(how).reindex(layers).to_numpy() for how in ("mean", "min", "max"))
        x = np.arange(len(layers)) + offset
        lines.append(_draw_group(ax, x, mean, low, high, color, marker if few else ""))
    ax.set_xlim(-0.6, len(layers) - 0.4)
    ax.set_ylim(bottom=0)
    percent(ax.yaxis)
    name_ticks(ax.xaxis, range(len(layers)), short_layers(layers, 16))
    show_groups(ax, palette, lines, [Line2D([], [], color=MARK, label="range over\nexperts")] if few else [])
    return ax


def _draw_group(
    ax: Axes, x: np.ndarray, mean: np.ndarray, low: np.ndarray, high: np.ndarray, color: str, marker: str
) -> Line2D:
    """Draw one group's means and, if it has a marker, ranges; return the line of the means."""
    wide = len(x) > _MOST_BARS
    if marker and wide:
        ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    elif marker:
        ax.vlines(x, low, high, color=color)
    look: dict[str, Any] = dict(linewidth=thin(0.7), markersize=2.5 * thin(1.0)) if wide else {}
    return ax.plot(x, mean, color=color, marker=marker, **look)[0]
