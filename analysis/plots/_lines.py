"""What the plots of curves share: lines with bands, axes in powers and in engineering units."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.container import ErrorbarContainer
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis.plots._frame import apart, axis_length, name_ticks, tick_size
from analysis.styles import group_colors

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
MARK = "0.35"
"""Grey of reference lines and remarks."""
_STEPS = ((1.0, 2.0, 5.0), (1.0, 3.0))
"""Ticks within a power of ten, the denser ones first."""


def looks(names: list[Any]) -> dict[Any, dict[str, Any]]:
    """Give every name a colour and a marker, so that a pair differs even where the colours are alike in grey."""
    colors = group_colors(len(names))
    return {name: dict(color=colors[i], marker=MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def thin(share: float = 0.6) -> float:
    """Return a width below that of the lines of the style, for many lines or for those that are not data."""
    return share * float(mpl.rcParams["lines.linewidth"])


def sparse(index: int, points: int) -> dict[str, Any]:
    """Return a marker for the line of that number, at some of its points, so that lines differ in grey too."""
    step = max(1, points // 8)
    return dict(marker=MARKERS[index % len(MARKERS)], markevery=(min(index, step - 1, points - 1), step))


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
    # A label is up to four characters wide, and names and legends at the sides will take part of a width.
    room = axis_length(axis) / tick_size(axis) / (4.5 if isinstance(axis, XAxis) else 2.5)
    if 0 < decades < 0.7:
        axis.set_major_locator(MaxNLocator(4))
    else:
        steps = next((steps for steps in _STEPS if len(steps) * decades + 1 <= room), (1.0,))
        axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


def doubling(ax: Axes, values: np.ndarray) -> None:
    """Make the horizontal axis logarithmic to base 2, with ticks at the values, or at the powers of 2 among many."""
    known = np.unique(values[np.isfinite(values) & (values > 0)])
    ax.set_xscale("log", base=2)
    if len(known):
        ax.set_xlim(known[0] / 2**0.25, known[-1] * 2**0.25)
        powers = known[np.log2(known) % 1 == 0]
        if len(powers) > 1 and len(apart(ax.xaxis, known, list(map("{:g}".format, known)))) < len(known):
            known = powers
        name_ticks(ax.xaxis, known, list(map("{:g}".format, known)))
