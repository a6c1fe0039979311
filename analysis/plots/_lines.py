"""What the plots of curves share: lines with bands, axes in powers and in engineering units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.container import ErrorbarContainer
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis.plots._frame import name_ticks
from analysis.styles import group_colors

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
MARK = "0.35"
"""Grey of reference lines and remarks."""


def looks(names: list[Any]) -> dict[Any, dict[str, Any]]:
    """Give every name a colour and a marker, so that a pair differs even where the colours are alike in grey."""
    colors = group_colors(len(names))
    return {name: dict(color=colors[i], marker=MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def curve(ax: Axes, rows: pd.DataFrame, x: str, label: str, look: dict[str, Any]) -> ErrorbarContainer:
    """Draw column score against column `x`, in the order of x, with a band of ± error; a single point has a bar.

    Points without a finite score are left out, and those without a finite error have no band.
    """
    rows = rows[np.isfinite(rows[x]) & np.isfinite(rows["score"])].sort_values(x, kind="stable")
    at, score, error = (rows[column].to_numpy() for column in (x, "score", "error"))
    bars = error if len(at) == 1 and np.isfinite(error).all() else None
    line = ax.errorbar(at, score, yerr=bars, capsize=2, label=label, **look)
    if len(at) > 1 and np.isfinite(error).any():
        ax.fill_between(at, score - error, score + error, color=look["color"], alpha=0.2, linewidth=0)
    return line


def percent(axis: Axis) -> None:
    """Show shares of 1 in percent."""
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %".replace("-", "−")))


def engineering(axis: Axis, values: np.ndarray) -> None:
    """Make an axis logarithmic with ticks such as 20k and 1M, several of them also where the values span little."""
    axis.axes.set(**{"xscale" if isinstance(axis, XAxis) else "yscale": "log"})
    known = values[np.isfinite(values) & (values > 0)]
    decades = np.log10(known.max() / known.min()) if len(known) else 0.0
    if 0 < decades < 0.7:
        axis.set_major_locator(MaxNLocator(4))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,), numticks=12))
    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


def doubling(ax: Axes, values: np.ndarray) -> None:
    """Make the horizontal axis logarithmic to base 2, with ticks at the values themselves."""
    known = np.unique(values[np.isfinite(values) & (values > 0)])
    ax.set_xscale("log", base=2)
    if len(known):
        ax.set_xlim(known[0] / 2**0.25, known[-1] * 2**0.25)
        name_ticks(ax.xaxis, list(known), [f"{value:g}" for value in known])
