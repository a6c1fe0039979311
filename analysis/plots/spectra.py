"""Multilinear spectra of the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.plots._frame import (
    axes_or_new,
    checked,
    color_scale,
    legend_beside,
    legend_over,
    say_no_values,
    short_layers,
)
from analysis.plots._lines import MARK, sparse, thin
from analysis.styles import PALETTE, group_colors

_CHOSEN: dict[str, Any] = dict(marker="*", markersize=9, linestyle="none", markeredgecolor="black", zorder=3)
_LOWEST = 1e-8
"""Values below this share of the largest are noise of float32 and left below the axes."""


def spectrum(
    table: pd.DataFrame,
    *,
    mode: str = "input",
    chosen: int | Mapping[str, int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the singular values of one unfolding of every layer's experts, relative to the largest of the layer.

    Parameters
    ----------
    table : DataFrame
        Columns layer, mode, index (from 1), value and energy; one row for each layer, mode and index. Only rows of
        `mode` are drawn, and energy is not.
    mode : str, optional
        Which unfolding.
    chosen : int or mapping of layer to int, optional
        Rank that was chosen: for all layers, marked by a vertical line, or for each layer, marked on its curve.
    ax : Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        A line for each layer in the order of the table, with some markers and named in a legend, or by a colour bar
        without markers if there are more than eight layers. The vertical axis is logarithmic and reaches down to 1e-8
        at most.

    Raises
    ------
    ValueError
        If columns or rows are missing, an index occurs twice or is below 1, `mode` is not in the table, or `chosen` is
        below 1 or names no layer.
    """
    table = checked("table", table, ["layer", "mode", "index"], ["value"], unique=["layer", "mode", "index"])
    modes = list(dict.fromkeys(table["mode"]))
    if mode not in modes:
        raise ValueError(f"mode is one of those in the table ({', '.join(map(str, modes))}), got {mode!r}")
    if table["index"].min() < 1:
        raise ValueError(f"column 'index' of table counts from 1, found {table['index'].min()}")
    table = table[table["mode"] == mode]
    ranks = _ranks(chosen, table)
    curves = {layer: _relative(rows) for layer, rows in table.groupby("layer", sort=False)}
    ax = axes_or_new(ax)
    ax.set(xlabel=f"index of the singular value, {mode} mode", ylabel="singular value / largest")
    if all(np.isnan(values).all() for _, values in curves.values()):
        say_no_values(ax)
        return ax
    handles, names, colors = [], short_layers(curves), group_colors(len(curves))
    many = len(curves) > len(PALETTE)
    for number, (layer, (index, values)) in enumerate(curves.items()):
        look = dict(linewidth=thin()) if many else sparse(number, len(index))
        handles += ax.plot(index, values, color=colors[number], label=names[number], **look)
        if isinstance(chosen, Mapping) and layer in ranks:
            known = index == ranks[layer]
            ax.plot(index[known], values[known], **_CHOSEN, markerfacecolor=colors[number])
    ax.set_yscale("log")
    ax.set_ylim(bottom=max(ax.get_ylim()[0], _LOWEST))
    ax.set_xlim(left=max(ax.get_xlim()[0], 0.5))
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    _explain(ax, handles, _mark(ax, chosen), colors, names)
    return ax


def _ranks(chosen: int | Mapping[str, int] | None, table: pd.DataFrame) -> Mapping[str, int]:
    """Return the chosen rank of every layer that has one, after checking them."""
    layers = list(dict.fromkeys(table["layer"]))
    ranks = chosen if isinstance(chosen, Mapping) else {} if chosen is None else dict.fromkeys(layers, chosen)
    unknown = [str(layer) for layer in ranks if layer not in layers]
    if unknown:
        raise ValueError(f"chosen names layers of the table, found {', '.join(unknown)}")
    low = [rank for rank in ranks.values() if rank < 1]
    if low:
        raise ValueError(f"chosen ranks are 1 or more, found {low[0]}")
    return ranks


def _relative(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of a layer in order, and its values over the first; what a logarithm cannot show is NaN."""
    rows = rows.sort_values("index")
    values = rows["value"].to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = values / values[0]
    return rows["index"].to_numpy(), np.where(np.isfinite(relative) & (relative > 0), relative, np.nan)


def _mark(ax: Axes, chosen: int | Mapping[str, int] | None) -> list[Line2D]:
    """Mark a rank chosen for all layers, and return what the legend says of chosen ranks."""
    if chosen is None:
        return []
    if isinstance(chosen, Mapping):
        return [Line2D([], [], **_CHOSEN, markerfacecolor="white", label="chosen rank")]
    return [ax.axvline(chosen, color=MARK, linestyle="--", linewidth=thin(0.9), label=f"chosen rank {chosen}")]


def _explain(ax: Axes, layers: list[Line2D], marks: list[Line2D], colors: list[str], names: list[str]) -> None:
    """Name few layers in a legend, and the depth of many by a colour bar."""
    if len(layers) <= len(PALETTE):
        legend_beside(ax, [*layers, *marks])
        return
    color_scale(ax, colors, names, "layer", most=5)
    legend_over(ax, marks)
