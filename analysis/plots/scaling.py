"""How the score grows with experts, and the parameters with width and experts.

Legend: D, K and T are the features of a layer, the groups and the experts of a group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.plots._frame import axes_or_new, checked, legend_beside, say_no_values, short_name
from analysis.plots._lines import curve, doubling, engineering, looks

_AGAINST = {"width": "layer width D (features)", "experts": "experts K·T"}


def expert_scaling(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the score against the number of experts.

    Parameters
    ----------
    table : DataFrame
        Columns experts, the number K·T; score, a mean in the unit of the caller; error, its standard error, or NaN; and
        optionally series, the name of a curve such as "r=4".
    ax : Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        A curve with markers for each series with a band of ± 1 standard error; experts on an axis of powers of 2.

    Raises
    ------
    ValueError
        If columns or rows are missing, a number of experts is not positive, or occurs twice in a series.
    """
    named = isinstance(table, pd.DataFrame) and "series" in table.columns
    keys = ["series"] if named else []
    table = checked("table", table, keys, ["experts", "score", "error"], unique=[*keys, "experts"])
    if (table["experts"] <= 0).any():
        raise ValueError(f"column 'experts' of table is positive, found {table['experts'].min():g}")
    ax = axes_or_new(ax)
    ax.set(xlabel=_AGAINST["experts"], ylabel="score (mean ± 1 s.e.)")
    if not np.isfinite(table[["experts", "score"]]).all(axis=1).any():
        say_no_values(ax)
        return ax
    doubling(ax, table["experts"].to_numpy())
    series = table["series"] if named else pd.Series("", index=table.index)
    handles: list[Any] = [
        curve(ax, table[series == name], "experts", short_name(name), look)
        for name, look in looks(list(dict.fromkeys(series))).items()
    ]
    if named:
        legend_beside(ax, handles)
    return ax


def parameter_scaling(table: pd.DataFrame, *, against: str = "width", ax: Axes | None = None) -> Axes:
    """Draw how the trained parameters of every method grow with the layer's width or the number of experts.

    Parameters
    ----------
    table : DataFrame
        Columns method; x, widths D or numbers of experts K·T; parameters, the number trained.
    against : {"width", "experts"}, optional
        What x is.
    ax : Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        A line with markers for each method on logarithmic axes; the legend names methods from the largest count down.

    Raises
    ------
    ValueError
        If columns or rows are missing, a number is not positive, x occurs twice for a method, or `against` is another.
    """
    if against not in _AGAINST:
        raise ValueError(f"against is one of {', '.join(_AGAINST)}, got {against!r}")
    table = checked("table", table, ["method"], ["x", "parameters"], unique=["method", "x"])
    for column in ("x", "parameters"):
        if (table[column] <= 0).any():
            raise ValueError(f"column {column!r} of table is positive, found {table[column].min():g}")
    ax = axes_or_new(ax)
    ax.set(xlabel=_AGAINST[against], ylabel="trained parameters")
    if not np.isfinite(table[["x", "parameters"]]).all(axis=1).any():
        say_no_values(ax)
        return ax
    doubling(ax, table["x"].to_numpy())
    engineering(ax.yaxis, table["parameters"].to_numpy())
    lines: dict[Any, float] = {}
    for method, look in looks(list(dict.fromkeys(table["method"]))).items():
        rows = table[table["method"] == method].dropna().sort_values("x")
        (line,) = ax.plot(rows["x"], rows["parameters"], label=short_name(method), **look)
        lines[line] = rows["parameters"].iloc[-1] if len(rows) else 0.0
    legend_beside(ax, sorted(lines, key=lambda line: -lines[line]))
    return ax
