"""Heat maps of the R×R slices of a layer's core.

Legend: K, T, P and R are the groups, experts of a group, shared slices of a group and rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from analysis.plots._frame import (
    axes_or_new,
    axis_length,
    bare,
    finite,
    name_ticks,
    say_no_values,
    scale_bar,
    short_name,
    signed_scale,
    tick_size,
)

_GAP = 0.12
"""Space between two slices, in widths of a slice."""
_STEP = 1 + _GAP
_HEAD = 0.6
"""Space for the names of groups above a row of them, in widths of a slice."""


def core_slices(
    slices: np.ndarray,  # (K, P or T, R, R)
    *,
    groups: Sequence[Any] | None = None,
    row: str = "slice",
    ax: Axes | None = None,
) -> Axes:
    """Draw all slices of a core as heat maps, one column for each group, on one scale centred at 0.

    Groups too many for one row of columns follow in further rows, with their names above.

    Parameters
    ----------
    slices : (K, P, R, R) or (K, T, R, R) array
        Core slices 𝒢[i,p], or the slices mixed for every expert. Entries have no unit.
    groups : sequence of length K, optional
        Names of the groups; their numbers by default.
    row : str, optional
        What the second axis of `slices` counts: "slice", or "expert" for mixed slices.
    ax : Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        One image for each slice, group after group, slice 0 uppermost.

    Raises
    ------
    ValueError
        If the array has another shape or `groups` another length.
    """
    slices_KPRR = finite("slices", slices, "(K, P, R, R)")
    k, p, r, width = slices_KPRR.shape
    if r != width:
        raise ValueError(f"slices are square, got {r}×{width}")
    names = [short_name(group) for group in (range(k) if groups is None else groups)]
    if len(names) != k:
        raise ValueError(f"groups names each of the K={k} groups of slices, got {len(names)} names")
    ax = axes_or_new(ax)
    ax.set(xlabel="group", ylabel=row)
    bare(ax)
    if np.isnan(slices_KPRR).all():
        say_no_values(ax)
        return ax
    scale = signed_scale(float(np.nanmax(np.abs(slices_KPRR))))
    columns = _columns(ax, k, p)
    head = _HEAD if columns < k else 0.0
    tops = np.arange(-(-k // columns)) * (p * _STEP + head)
    for i, j in np.ndindex(k, p):
        left, top = i % columns * _STEP, tops[i // columns] + j * _STEP
        ax.imshow(slices_KPRR[i, j], extent=(left, left + 1, top + 1, top), **scale)
    # Square slices, unless a stack of them would be too thin to see.
    ax.set_aspect("equal" if p <= 4 * columns else "auto")
    ax.set(xlim=(-_GAP, columns * _STEP), ylim=(tops[-1] + p * _STEP, -_GAP - head))
    middles = [top + j * _STEP + 0.5 for top in tops for j in range(p)]
    name_ticks(ax.yaxis, middles, [str(j) for j in range(p)] * len(tops))
    name_ticks(ax.xaxis, [i * _STEP + 0.5 for i in range(columns)], names[:columns])
    if columns < k:
        _name_above(ax, names, columns, tops)
    scale_bar(ax, scale, "entry")
    return ax


def _columns(ax: Axes, k: int, p: int) -> int:
    """Return how many groups to put beside each other: all, unless several rows of them make slices twice as wide."""
    width, height = axis_length(ax.xaxis), axis_length(ax.yaxis)
    sides = {k: min(width / (k * _STEP), height / (p * _STEP))}
    for columns in range(1, k):
        rows = -(-k // columns)
        sides[columns] = min(width / (columns * _STEP), height / (rows * (p * _STEP + _HEAD)))
    best = max(sides, key=lambda columns: sides[columns])
    return best if sides[best] > 2 * sides[k] else k


def _name_above(ax: Axes, names: list[str], columns: int, tops: np.ndarray) -> None:
    """Write the groups' names above their slices instead of below, as many as the first row of names has room for."""
    shown = [round((tick - 0.5) / _STEP) for tick in ax.get_xticks()]
    ax.set_xticks([])
    size = tick_size(ax.xaxis)
    for i, name in enumerate(names):
        if i % columns in shown:
            place = (i % columns * _STEP + 0.5, tops[i // columns] - 0.06)
            ax.text(*place, name, ha="center", va="bottom", size=size)
