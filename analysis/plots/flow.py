"""Which labels go to which groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from analysis.plots._frame import axes_or_new, axis_length, finite, full_name, group_palette, say_no_values

_BAR = 0.025
"""Width of the bars, where the bands take the width 1."""


def label_group_flow(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the samples of each label as bands to the groups that they were routed to.

    Parameters
    ----------
    table : DataFrame
        Number of samples of each label (index) in each group (columns); what is not finite counts as 0.
    ax : Axes, optional
        Where to draw; a new figure by default. Its ticks and frame are removed.

    Returns
    -------
    Axes
        A band for each count above 0, label after label and coloured by group, as high as its share of all samples;
        bars for labels (left) and groups (right), each with its name and share unless names would overlap, where
        those of the larger bars are kept.

    Raises
    ------
    ValueError
        If the table has no cell or a negative count.
    """
    if not isinstance(table, pd.DataFrame) or table.size == 0:
        found = table.shape if isinstance(table, pd.DataFrame) else type(table).__name__
        raise ValueError(
            f"table is a DataFrame of counts with a row for each label and a column for each group, got {found}"
        )
    filled = table.astype(object).where(table.notna(), np.nan)
    counts = finite("table", filled.to_numpy(), "(labels, groups)")
    if (counts < 0).any():
        raise ValueError(f"counts are 0 or more, found {np.nanmin(counts):g}")
    ax = axes_or_new(ax)
    ax.axis("off")
    if not np.nansum(counts):
        say_no_values(ax, "no samples" if np.isfinite(counts).any() else "no finite values")
        return ax
    shares = np.nan_to_num(counts) / np.nansum(counts)
    palette = group_palette(table.columns)
    colors = [palette[group] for group in table.columns]
    gap = min(0.03, 0.3 / max(shares.shape))
    lefts, rights = _starts(shares.sum(axis=1), gap), _starts(shares.sum(axis=0), gap)
    _draw_bands(ax, shares, lefts, rights, colors)
    _draw_bars(ax, -_BAR, lefts, shares.sum(axis=1), ["0.45"] * len(lefts))
    _draw_bars(ax, 1.0, rights, shares.sum(axis=0), colors)
    labels = [full_name(label, "label") for label in table.index]
    groups = [full_name(group, "group") for group in table.columns]
    height = 1 + gap * (max(shares.shape) - 1)
    ax.set(xlim=(-_BAR, 1 + _BAR), ylim=(height / 2, -height / 2))
    _name_bars(ax, -_BAR - 0.015, lefts, shares.sum(axis=1), labels, ha="right")
    _name_bars(ax, 1 + _BAR + 0.015, rights, shares.sum(axis=0), groups, ha="left")
    return ax


def _starts(heights: np.ndarray, gap: float) -> np.ndarray:
    """Return the upper ends of bars stacked from the top with gaps between them, the stack centred at 0."""
    height = heights.sum() + gap * (len(heights) - 1)
    return np.concatenate([[0.0], np.cumsum(heights + gap)[:-1]]) - height / 2


def _draw_bands(ax: Axes, shares: np.ndarray, lefts: np.ndarray, rights: np.ndarray, colors: Sequence[str]) -> None:
    """Draw the bands; in a bar they lie in the order of the bars opposite, so that they cross as little as can be."""
    left_ends = lefts[:, None] + np.cumsum(shares, axis=1) - shares
    right_ends = rights[None, :] + np.cumsum(shares, axis=0) - shares
    for label, group in np.argwhere(shares > 0):
        path = _band(left_ends[label, group], right_ends[label, group], shares[label, group])
        ax.add_patch(PathPatch(path, facecolor=colors[group], alpha=0.55, linewidth=0))


def _band(left: float, right: float, height: float) -> Path:
    """Return a band of constant vertical height between two curves, from x=0 to x=1."""
    over = [(0, left), (0.5, left), (0.5, right), (1, right)]
    under = [(1, right + height), (0.5, right + height), (0.5, left + height), (0, left + height)]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    return Path([*over, *under, (0, left)], codes)


def _draw_bars(ax: Axes, x: float, starts: np.ndarray, heights: np.ndarray, colors: Sequence[str]) -> None:
    """Draw one side's bars."""
    for start, height, color in zip(starts, heights, colors):
        ax.add_patch(Rectangle((x, start), _BAR, height, facecolor=color, linewidth=0))


def _name_bars(ax: Axes, x: float, starts: np.ndarray, heights: np.ndarray, names: Sequence[str], ha: str) -> None:
    """Write names and shares beside the bars, those of larger bars first and none over another."""
    size = FontProperties(size="medium").get_size_in_points()
    low, high = ax.get_ylim()
    room = 1.15 * size / axis_length(ax.yaxis) * abs(high - low)
    taken: list[float] = []
    for index in np.argsort(-heights, kind="stable"):
        middle = starts[index] + heights[index] / 2
        if all(abs(middle - other) >= room for other in taken):
            taken.append(middle)
            text: dict[str, Any] = dict(ha=ha, va="center", size=size)
            ax.text(x, middle, f"{names[index]}  {_percent(heights[index])}", **text)


def _percent(share: float) -> str:
    """Return a share of 1 as whole percent, without calling a few samples none."""
    return "<1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"
