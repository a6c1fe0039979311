"""What a method's parameters buy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.plots._frame import axes_or_new, checked, legend_beside, say_no_values
from analysis.plots._lines import MARK, curve, engineering, looks, thin


def trade_off(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the score of methods at several sizes against their trained parameters, and the Pareto front.

    Parameters
    ----------
    table : DataFrame
        Columns method; parameters, the number trained; score, a mean over seeds, in the unit of the caller; error, its
        standard error, or NaN; seeds, how many, or NaN; front, whether no other row has a higher score with as few
        parameters. Optionally leads, whether no other row of the method has: the others are faint marks beside the
        method's curve.
    ax : Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        A curve with markers for each method with a band of ± 1 standard error (an error bar for a method of one
        size), then the front as a dashed step line to the largest size; parameters on a logarithmic axis in thousands
        and millions.

    Raises
    ------
    ValueError
        If columns or rows are missing, or a number of parameters is not positive.
    """
    leads = table["leads"].to_numpy(bool) if isinstance(table, pd.DataFrame) and "leads" in table else True
    table = checked("table", table, ["method", "front"], ["parameters", "score", "error", "seeds"]).assign(leads=leads)
    if (table["parameters"] <= 0).any():
        raise ValueError(f"column 'parameters' of table is positive, found {table['parameters'].min():g}")
    ax = axes_or_new(ax)
    varied = table["seeds"].nunique() > 1
    seeds = "" if varied or table["seeds"].isna().all() else f", {_seeds(table['seeds'])}"
    ax.set(xlabel="trained parameters", ylabel=f"score (mean ± 1 s.e.{seeds})")
    if not np.isfinite(table[["parameters", "score"]]).all(axis=1).any():
        say_no_values(ax)
        return ax
    handles: list[Any] = []
    for method, look in looks(list(dict.fromkeys(table["method"]))).items():
        rows = table[table["method"] == method]
        seeds = f" ({_seeds(rows['seeds'])})" if varied and rows["seeds"].notna().any() else ""
        handles.append(curve(ax, rows[rows["leads"]], "parameters", f"{method}{seeds}", look))
        others = rows[~rows["leads"]]
        if len(others):
            ax.plot(others["parameters"], others["score"], linestyle="", alpha=0.3, zorder=1, **look)
    front = table[table["front"].astype(bool) & np.isfinite(table["score"])].sort_values("parameters")
    if len(front) and front["parameters"].iloc[-1] < table["parameters"].max():
        # More parameters than the last of the front buy nothing.
        front = pd.concat([front, front.tail(1).assign(parameters=table["parameters"].max())])
    if len(front) > 1:
        line: dict[str, Any] = dict(color=MARK, linestyle="--", linewidth=thin(0.9), zorder=1)
        handles += ax.step(front["parameters"], front["score"], where="post", label="Pareto front", **line)
    engineering(ax.xaxis, table["parameters"].to_numpy())
    legend_beside(ax, handles)
    return ax


def _seeds(seeds: pd.Series) -> str:
    """Return how many seeds means are over, at least one of which is known."""
    low, high = int(seeds.min()), int(seeds.max())
    return f"n = {low}" if low == high else f"n = {low}–{high}"
