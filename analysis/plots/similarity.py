"""How alike the experts of a layer are, and the groups of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle

from analysis.plots._frame import (
    axes_or_new,
    axis_length,
    bare,
    checked,
    finite,
    name_ticks,
    ordered,
    say_no_values,
    scale_bar,
    share_scale,
    short_layers,
    short_name,
    signed_scale,
)
from analysis.styles import MISSING

MEASURES = {"cosine": "cosine similarity", "cka": "linear CKA of outputs", "overlap": "overlap of subspaces"}
"""What experts can be compared by, and what its colour bar is called."""


def expert_similarity(
    matrix: np.ndarray,  # (E, E)
    groups: Sequence[Any] | np.ndarray,  # (E,)
    *,
    measure: str = "cosine",
    ax: Axes | None = None,
) -> Axes:
    """Draw how alike all experts of a layer are, the experts of a group side by side.

    Parameters
    ----------
    matrix : (E, E) array
        Cosines in [−1, 1], or CKA or overlaps in [0, 1]. Rounding beyond them is tolerated up to 1e-4.
    groups : sequence of length E
        Group of every expert; groups are ordered by number, or by appearance if they are names, and the experts of a
        group stay in their order.
    measure : {"cosine", "cka", "overlap"}, optional
        What the matrix holds: names the colour bar, and all but the cosine are drawn on a scale from 0 to 1.
    ax : Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        One image on a scale from −1 or 0 to 1, with lines between groups and the groups' names on both axes.

    Raises
    ------
    ValueError
        If the matrix is not square, holds a number outside [−1, 1], `groups` has another length, or `measure` is
        unknown.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure is one of {', '.join(MEASURES)}, got {measure!r}")
    cosines_EE = finite("matrix", matrix, "(E, E)")
    count, width = cosines_EE.shape
    names = list(groups)
    if count != width or len(names) != count:
        raise ValueError(f"matrix is (E, E) and groups is (E,), got {cosines_EE.shape} and ({len(names)},)")
    _check_cosines("matrix", cosines_EE)
    ranks = {group: rank for rank, group in enumerate(ordered(names))}
    order = sorted(range(count), key=lambda expert: ranks[names[expert]])
    ax = axes_or_new(ax)
    ax.set(xlabel="experts, by group", ylabel="experts, by group")
    bare(ax)
    if np.isnan(cosines_EE).all():
        say_no_values(ax)
        return ax
    scale = signed_scale(1.0) if measure == "cosine" else share_scale()
    ax.imshow(cosines_EE[np.ix_(order, order)], **scale)
    sizes = np.array([names.count(group) for group in ranks])
    ends = np.cumsum(sizes) - 0.5
    # Lines of a fixed width would hide the small cells of many groups.
    width = min(0.8, 0.06 * axis_length(ax.xaxis) / len(sizes))
    for end in ends[:-1]:
        ax.axhline(end, color="black", linewidth=width)
        ax.axvline(end, color="black", linewidth=width)
    for axis in (ax.xaxis, ax.yaxis):
        name_ticks(axis, list(ends - sizes / 2), [short_name(group) for group in ranks])
    scale_bar(ax, scale, MEASURES[measure])
    return ax


def layer_group_similarity(table: pd.DataFrame, *, value: str = "across", ax: Axes | None = None) -> Axes:
    """Draw how alike the experts of each group are to others, for every layer.

    Parameters
    ----------
    table : DataFrame
        Columns layer, group, within and across, one row for each layer and group: mean cosines in [−1, 1] of a group's
        experts among themselves and with those of other groups.
    value : {"across", "within"}, optional
        The column drawn.
    ax : Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        One image on a scale from −1 to 1, a row for each layer in the order of the table (names without their common
        beginning) and a column for each group; hatched grey where the mean is unknown, as with a single group.

    Raises
    ------
    ValueError
        If columns or rows are missing, a layer and group occur twice, a mean lies outside [−1, 1], or `value` is
        another.
    """
    if value not in ("across", "within"):
        raise ValueError(f"value is one of across, within, got {value!r}")
    columns = ["within", "across"]
    table = checked("table", table, ["layer", "group"], columns, unique=["layer", "group"])
    _check_cosines(f"column {value!r} of table", table[value].to_numpy())
    layers, groups = list(dict.fromkeys(table["layer"])), ordered(table["group"])
    cells = table.pivot(index="layer", columns="group", values=value).loc[layers, groups].to_numpy()
    ax = axes_or_new(ax)
    ax.set(xlabel="group", ylabel="layer")
    bare(ax)
    if np.isnan(cells).all():
        say_no_values(ax)
        return ax
    scale = signed_scale(1.0)
    ax.imshow(cells, aspect="auto", **scale)
    _hatch_unknown(ax, cells)
    name_ticks(ax.xaxis, range(len(groups)), [short_name(group) for group in groups])
    name_ticks(ax.yaxis, range(len(layers)), short_layers(layers))
    _write_values(ax, cells)
    scale_bar(ax, scale, f"mean cosine {value} groups" if value == "across" else "mean cosine within the group")
    return ax


def _check_cosines(name: str, values: np.ndarray) -> None:
    """Reject a number that is no cosine."""
    far = np.abs(np.nan_to_num(values))
    if far.max() > 1 + 1e-4:
        found = values.flat[far.argmax()]
        raise ValueError(f"{name} holds cosines in [-1, 1], found {found:g}")


def _hatch_unknown(ax: Axes, cells: np.ndarray) -> None:
    """Hatch the cells without a number, which grey printing would confuse with a colour."""
    boxes = [Rectangle((column - 0.5, row - 0.5), 1, 1) for row, column in np.argwhere(np.isnan(cells))]
    if boxes:
        hatched: dict[str, Any] = dict(facecolor=MISSING, edgecolor="0.9", hatch="////", linewidth=0)
        ax.add_collection(PatchCollection(boxes, **hatched), autolim=False)


def _write_values(ax: Axes, cells: np.ndarray) -> None:
    """Write every known value into its cell, white on the dark ends of the scale, if the cells are large enough."""
    size = FontProperties(size="small").get_size_in_points()
    # The lengths are those before the names of layers take their room.
    if 0.7 * axis_length(ax.xaxis) < 3.2 * size * cells.shape[1] or axis_length(ax.yaxis) < 1.3 * size * cells.shape[0]:
        return
    for row, column in np.argwhere(np.isfinite(cells)):
        number = cells[row, column]
        shade = "white" if abs(number) > 0.6 else "black"
        ax.text(column, row, f"{number:.2f}".replace("-", "−"), ha="center", va="center", color=shade, size=size)
