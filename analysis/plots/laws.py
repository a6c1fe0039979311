"""Fitted laws over the scores they were fitted to."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.plots._frame import axes_or_new, checked, say_no_values
from analysis.plots._lines import engineering, looks, thin


def fitted_law(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw laws and their confidence bands, also into axes that show the scores.

    Parameters
    ----------
    table : DataFrame
        Columns x, a size; score, the law there; low and high, its band, or NaN, as `analysis.scaling.PowerLaw.table`
        gives; and optionally series, the name of a law. Series in the order of a plot of scores have its colours.
    ax : Axes, optional
        Where to draw; a new figure with a logarithmic axis by default.

    Returns
    -------
    Axes
        A dashed line without markers for each series, in its band.

    Raises
    ------
    ValueError
        If columns or rows are missing, or a size is not positive.
    """
    named = isinstance(table, pd.DataFrame) and "series" in table.columns
    table = checked("table", table, ["series"] if named else [], ["x", "score", "low", "high"])
    if (table["x"] <= 0).any():
        raise ValueError(f"column 'x' of table is positive, found {table['x'].min():g}")
    own, ax = ax is None, axes_or_new(ax)
    known = np.isfinite(table[["x", "score"]]).all(axis=1)
    if own:
        ax.set(xlabel="size", ylabel="score")
        if not known.any():
            say_no_values(ax)
            return ax
        engineering(ax.xaxis, table["x"].to_numpy())
    series = table["series"] if named else pd.Series("", index=table.index)
    for name, look in looks(list(dict.fromkeys(series))).items():
        rows = table[known & (series == name)].sort_values("x")
        ax.plot(rows["x"], rows["score"], color=look["color"], linestyle="--", linewidth=thin(0.9))
        ax.fill_between(rows["x"], rows["low"], rows["high"], color=look["color"], alpha=0.12, linewidth=0)
    return ax
