"""Pieces of a page: escaped text, tables that can be sorted, matplotlib figures as inline SVG."""

from __future__ import annotations

import html
import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import UNPRINTABLE

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
FEW_ROWS = 15
"""Tables longer than this are folded."""

NUMBER = ' class="number"'

Format = Callable[[Any], str]


def escape(text: Any) -> str:
    """Any text as the content of an element or of a quoted attribute."""
    return html.escape(UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(text)), quote=True)


def note(text: str) -> str:
    """A remark on what is missing or could not be shown."""
    return f'<p class="note">{escape(text)}</p>'


def tiles(facts: Mapping[str, str]) -> str:
    """A few numbers with their names, large."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="tiles">{items}</dl>'


def table(frame: pd.DataFrame, caption: str, formats: Mapping[str, Format] | None = None) -> str:
    """A table whose first column names its rows; numbers can be sorted by, whatever they are shown as.

    Parameters
    ----------
    frame : DataFrame
        Its columns are the header.
    caption : str
        What the table shows.
    formats : mapping of column to callable, optional
        How numbers are shown; default: three digits.
    """
    formats = formats or {}
    first, *rest = map(str, frame.columns)
    rows = []
    for values in frame.itertuples(index=False):
        cells = [_cell(value, formats.get(name, digits)) for name, value in zip(rest, values[1:])]
        rows.append(f'<tr><th scope="row">{_breakable(values[0])}</th>{"".join(cells)}</tr>')
    words = [any(isinstance(value, str) for value in frame.iloc[:, column]) for column in range(1, len(rest) + 1)]
    head = f'<th scope="col">{escape(first)}</th>' + "".join(
        f'<th scope="col"{"" if word else NUMBER}>{escape(name)}</th>' for name, word in zip(rest, words)
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    shown = f"<caption><span>{escape(caption)}</span></caption>"
    # The region scrolls where the page is narrow, so it has to take the focus.
    region = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table class="sortable">'
    whole = f"{region}{shown}{body}</table></div>"
    if len(rows) <= FEW_ROWS:
        return whole
    return f"<details><summary>{escape(caption)} ({len(rows)} rows)</summary>{whole}</details>"


def drawing(figure: Figure, prefix: str, title: str, caption: str, *, explained: bool = True) -> str:
    """A figure with its title and, if it is to be `explained`, caption; `prefix` is unique in the page."""
    label = escape(f"{title}. {caption}")
    svg = inline_svg(figure, prefix)
    shown = f" {escape(caption)}" if explained else ""
    return (
        f'<figure><div class="plot" role="img" aria-label="{label}">{svg}</div>'
        f"<figcaption><b>{escape(title)}.</b>{shown}</figcaption></figure>"
    )


def inline_svg(figure: Figure, prefix: str) -> str:
    """A matplotlib figure as an SVG element whose text stays text and whose ids all start with a prefix.

    matplotlib numbers elements anew in every figure, so the clip paths of one figure would cut another one on the same
    page; and its style sheet would hold for the whole page.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": prefix, "svg.fonttype": "none"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        look: Any = dict(facecolor="none", bbox_inches="tight", pad_inches=0.05)
        figure.savefig(buffer, format="svg", metadata=nothing, **look)
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        for name, value in element.attrib.items():
            element.set(name, _prefixed(name, value, prefix))
    width = float(root.attrib.pop("width").removesuffix("pt"))
    root.attrib.pop("height")
    root.set("style", f"max-width:{width / 0.75:.0f}px")
    root.set("focusable", "false")
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    return ET.tostring(root, encoding="unicode")


def _prefixed(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name in ("href", f"{{{XLINK}}}href"):
        return f"#{prefix}-{value[1:]}" if value.startswith("#") else value
    return re.sub(r"url\(#", f"url(#{prefix}-", value)


def _breakable(name: Any) -> str:
    """A name that may be broken after its dots."""
    return escape(name).replace(".", ".<wbr>")


def _cell(value: Any, shown: Format) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    number = float(value)
    if not math.isfinite(number):
        return '<td class="number" data-value="">–</td>'
    return f'<td class="number" data-value="{number!r}">{escape(shown(value))}</td>'


# --- numbers as text -----------------------------------------------------------------------------------------------


def digits(value: Any) -> str:
    """Three significant digits; whole numbers whole, with their thousands apart."""
    number = float(value)
    if not math.isfinite(number):
        return "–"
    if number == int(number) and abs(number) < 1e15:
        return f"{int(number):,}".replace("-", "−")
    size = abs(number)
    text = f"{number:.2e}" if size < 1e-3 or size >= 1e6 else f"{number:,.{max(0, 2 - math.floor(math.log10(size)))}f}"
    return text.replace("-", "−")


def fixed(places: int) -> Format:
    """That many decimals."""
    return lambda value: f"{float(value):,.{places}f}".replace("-", "−")


def percent(value: Any) -> str:
    """A share of 1 in percent, with two significant digits below 10 %."""
    number = 100 * float(value)
    if not math.isfinite(number):
        return "–"
    places = 0 if number == 0 or abs(number) >= 10 else min(3, 1 - math.floor(math.log10(abs(number))))
    return f"{number:.{max(places, 0)}f}\u00a0%".replace("-", "−")


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number of things, in the singular for one."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
