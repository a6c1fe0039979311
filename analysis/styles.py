"""The look of the figures: sizes and fonts for a venue, colours that survive colour blindness and grey printing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.colors import to_hex

PALETTE: tuple[str, ...] = (
    "#0072B2",  # blue
    "#E69F00",  # orange
    "#009E73",  # bluish green
    "#000000",  # black
    "#56B4E9",  # sky blue
    "#D55E00",  # vermillion
    "#F0E442",  # yellow
    "#CC79A7",  # reddish purple
)
"""The eight colours of Okabe and Ito, ordered so that neighbours, and the first four among themselves, differ by 11 or
more in CIE lightness, which keeps them apart in grey."""

DIVERGING = "RdBu_r"
"""Colour map of signed quantities, white at its centre; its two ends differ for every common colour blindness."""

MISSING = "#A6A6A6"
"""Grey of what is not a finite number; it is on none of the colour scales."""

WIDTHS: dict[str, float] = {
    "neurips": 5.5,
    "iclr": 5.5,
    "icml": 6.75,
    "icml-column": 3.25,
    "acl": 6.3,
    "acl-column": 3.03,
    "aaai": 7.0,
    "aaai-column": 3.3,
    "ieee": 7.16,
    "ieee-column": 3.5,
    "cvpr": 6.875,
    "cvpr-column": 3.25,
    "acm": 7.0,
    "acm-column": 3.33,
    "jmlr": 6.0,
    "lncs": 4.8,
    "nature": 7.2,
    "nature-column": 3.5,
    "a4-text": 6.27,
    "letter-text": 6.5,
    "notebook": 7.0,
    "slide": 10.0,
}
"""Text and column widths in inches; "a4-text" and "letter-text" leave margins of one inch."""

_GOLDEN = (1 + 5**0.5) / 2

_KINDS: dict[str, dict[str, Any]] = {
    "paper": dict(width="neurips", format="pdf", font=8.0, line=1.1, marker=4.0),
    "notebook": dict(width="notebook", format="svg", font=10.0, line=1.5, marker=5.0),
    "slides": dict(width="slide", format="svg", font=16.0, line=2.5, marker=8.0),
}


def style(kind: str = "paper", *, width: str | None = None) -> AbstractContextManager[None]:
    """Set matplotlib's parameters for one kind of document, for the length of a ``with`` block.

    Text stays text in the file (TrueType in PDF and PostScript, characters in SVG), the layout is constrained, so that
    labels outside an axes are not cut, and files are vectors unless the name given to ``savefig`` ends otherwise.
    Embedding and format act when a figure is saved, so save it inside the block.

    Parameters
    ----------
    kind : {"paper", "notebook", "slides"}
        Font sizes (8, 10 and 16 pt), line widths and the default file format (PDF, SVG and SVG).
    width : str, optional
        Key of `WIDTHS`: figures are that many inches wide and lower by the golden ratio. By default "neurips",
        "notebook" or "slide".

    Returns
    -------
    context manager
        Restores the earlier parameters when it is left.

    Raises
    ------
    ValueError
        If the kind or the width is unknown.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> with style("paper", width="aaai-column"):
    ...     print(plt.rcParams["figure.figsize"])
    [3.3, 2.04]
    """
    if kind not in _KINDS:
        raise ValueError(f"kind is one of {', '.join(_KINDS)}, got {kind!r}")
    width = _KINDS[kind]["width"] if width is None else width
    if width not in WIDTHS:
        raise ValueError(f"width is one of {', '.join(WIDTHS)}, got {width!r}")
    return mpl.rc_context(_parameters(_KINDS[kind], WIDTHS[width]))


def group_colors(count: int) -> list[str]:
    """Return one colour for each of `count` groups, as hexadecimal strings.

    The colours of up to eight groups are those of `PALETTE`; more are taken from a scale of rising lightness, on which
    neighbours look alike and a colour bar takes the place of a legend.

    Raises
    ------
    ValueError
        If `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"colours are for 1 group or more, got {count}")
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    # The end of the scale is a yellow too light for lines on white.
    return [to_hex(color) for color in mpl.colormaps["viridis"](np.linspace(0.0, 0.93, count))]


def _parameters(look: dict[str, Any], width: float) -> Any:
    """Return the matplotlib parameters of one kind of document at a figure width in inches."""
    font, line = look["font"], look["line"]
    sizes = ("font.size", "axes.labelsize", "axes.titlesize")
    small_sizes = ("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "legend.title_fontsize")
    return {
        "figure.figsize": (width, round(width / _GOLDEN, 2)),
        "figure.constrained_layout.use": True,
        "figure.dpi": 150,
        "savefig.dpi": 300,
        "savefig.format": look["format"],
        "pdf.fonttype": 42,
        "ps.fonttype": 42,
        "svg.fonttype": "none",
        **dict.fromkeys(sizes, font),
        **dict.fromkeys(small_sizes, 0.875 * font),
        "axes.prop_cycle": cycler(color=PALETTE),
        "axes.linewidth": 0.6 * line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "lines.linewidth": line,
        "lines.markersize": look["marker"],
        "patch.linewidth": 0.6 * line,
        "hatch.linewidth": 0.5 * line,
        "xtick.major.width": 0.6 * line,
        "ytick.major.width": 0.6 * line,
        "legend.frameon": False,
        "legend.handlelength": 1.5,
        "image.interpolation": "nearest",
    }
