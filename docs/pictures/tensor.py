"""The picture of the mathematics page: the experts of a layer, their Tucker form, and the route through it.

    python docs/pictures/tensor.py

writes docs/images/tensor.svg. Portrait and in large letters, so that it reads on a phone and in a column alike.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

GROUPS, EXPERTS, SHARED, CHOSEN = 3, 3, 2, 1
"""K, T and P of the picture, and the group that its route takes."""

COLUMNS = (2.55, 5.3, 8.05)
"""Where the groups stand."""

INK, FAINT, PALE = "#1b2a3a", "#6b7885", "#e9eef3"
CHOICE, FACTOR, SAMPLE = "#d55e00", "#0072b2", "#009e73"
FILL = {CHOICE: "#fbdcc6", FACTOR: "#cfe4f3", SAMPLE: "#cdeadf", FAINT: PALE}


def box(ax: Axes, x: float, y: float, width: float, height: float, color: str, **options) -> None:
    """A rectangle, given its lower left corner."""
    style = dict(facecolor=FILL.get(color, "white"), edgecolor=color, linewidth=1.6)
    ax.add_patch(Rectangle((x, y), width, height, **{**style, **options}))


def say(ax: Axes, x: float, y: float, text: str, **options) -> None:
    """Text around a point."""
    ax.text(x, y, text, **{**dict(ha="center", va="center", color=INK, fontsize=15), **options})


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK, bend: float = 0.0) -> None:
    """An arrow from here to there."""
    form = dict(arrowstyle="-|>", mutation_scale=18, linewidth=1.8, color=color, shrinkA=0, shrinkB=0)
    ax.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **form))


def cells(ax: Axes, x: float, y: float, values: np.ndarray, size: float, color: str) -> None:
    """A matrix of numbers as shades of a colour; row 0 on top."""
    rows, columns = values.shape
    for (row, column), value in np.ndenumerate(values):
        corner = (x + column * size, y + (rows - 1 - row) * size)
        shade = mpl.colors.to_rgba(color, 0.08 + 0.72 * value)
        ax.add_patch(Rectangle(corner, size, size, facecolor=shade, edgecolor="white", linewidth=1))
    ax.add_patch(Rectangle((x, y), columns * size, rows * size, fill=False, edgecolor=color, linewidth=1.6))


def heading(ax: Axes, y: float, number: int, text: str, remark: str = "") -> None:
    """What a part of the picture shows."""
    say(ax, 0.2, y, rf"{number}  {text}", ha="left", fontsize=17)
    say(ax, 11.45, y, remark, ha="right", color=FAINT)


def tensor(ax: Axes, y: float) -> None:
    """K groups of T slices D×D, of which a route takes one group."""
    side, step = 1.5, 0.28
    heading(ax, y + 2.75, 1, r"All experts of a layer: $\mathcal{T}$", "never formed")
    for group, middle in enumerate(COLUMNS):
        color = CHOICE if group == CHOSEN else FAINT
        left = middle - (side + step * (EXPERTS - 1)) / 2
        for expert in reversed(range(EXPERTS)):
            box(ax, left + step * expert, y + step * expert, side, side, color)
        say(ax, left + side / 2, y + side / 2, f"group {group}", color=color if group == CHOSEN else INK)
    first = COLUMNS[0] - (side + step * (EXPERTS - 1)) / 2
    say(ax, first - 0.3, y + side / 2, "$D$")
    say(ax, first + side / 2, y - 0.35, "$D$")
    say(ax, 9.45, y + 1.7, "$T$ experts", ha="left")
    say(ax, 9.45, y + 1.15, "in each of", ha="left")
    say(ax, 9.45, y + 0.6, "$K$ groups", ha="left")


def core_and_factors(ax: Axes, y: float) -> None:
    """The Tucker form: a core of P slices R×R for every group, and the factors C, U and U."""
    side, step = 0.95, 0.24
    title = r"Stored: $\mathcal{T}_i = \mathcal{G}_i\,{\times}_1\, C\,{\times}_2\, U\,{\times}_3\, U$"
    heading(ax, y + 2.0, 2, title, "Tucker")
    for group, middle in enumerate(COLUMNS):
        color = CHOICE if group == CHOSEN else FAINT
        left = middle - (side + step * (SHARED - 1)) / 2
        for slice_ in reversed(range(SHARED)):
            box(ax, left + step * slice_, y + step * slice_, side, side, color)
        say(ax, left + side / 2, y + side / 2, rf"$\mathcal{{G}}_{group}$", color=color if group == CHOSEN else INK)
    say(ax, COLUMNS[0] + 0.75, y + 1.05, "$P$", ha="left")
    say(ax, COLUMNS[0] - 0.85, y + side / 2, "$R$")
    say(ax, COLUMNS[0] - 0.1, y - 0.35, "$R$")
    box(ax, 0.45, y - 0.15, 0.55, 1.6, FACTOR)
    say(ax, 0.72, y + 0.65, "$U$")
    say(ax, 0.72, y - 0.5, r"$D\!\times\!R$", color=FACTOR)
    box(ax, 9.55, y + 0.85, 1.6, 0.55, FACTOR)
    say(ax, 10.35, y + 1.12, r"$U^{\top}$")
    box(ax, 9.55, y - 0.25, 0.5, 0.75, FACTOR)
    say(ax, 9.8, y + 0.12, "$C$")
    say(ax, 10.2, y + 0.12, r"$T\!\times\!P$", ha="left", color=FACTOR)


def routing(ax: Axes, y: float) -> None:
    """Tokens, their pooled feature, the scores of all experts, and what is chosen."""
    rng = np.random.default_rng(4)
    tokens = rng.uniform(0.15, 0.9, (4, 5))
    tokens[3] = 0
    heading(ax, y + 2.0, 3, "Routed: once for all layers", "one per sample")
    cells(ax, 0.3, y, tokens, 0.34, SAMPLE)
    say(ax, 1.15, y - 0.35, "tokens", color=SAMPLE)
    say(ax, 1.15, y + 0.17, "padding", color=FAINT, fontsize=13)
    arrow(ax, (2.15, y + 0.75), (2.75, y + 0.75))
    cells(ax, 2.9, y + 0.58, tokens[:3].mean(0, keepdims=True), 0.34, SAMPLE)
    say(ax, 3.75, y + 0.2, "feature $f$", color=SAMPLE)
    arrow(ax, (4.75, y + 0.75), (5.35, y + 0.75))
    scores = np.array([[0.2, 0.35, 0.1], [0.45, 1.0, 0.65], [0.3, 0.15, 0.25]])
    cells(ax, 5.5, y + 0.06, scores, 0.46, FACTOR)
    box(ax, 5.5, y + 0.52, 1.38, 0.46, CHOICE, fill=False, linewidth=3)
    say(ax, 6.2, y - 0.35, r"scores $K\!\times\!T$", color=FACTOR)
    arrow(ax, (7.0, y + 0.75), (7.6, y + 0.75), CHOICE)
    cells(ax, 7.75, y + 0.52, scores[CHOSEN : CHOSEN + 1], 0.46, CHOICE)
    say(ax, 9.3, y + 0.75, "gates $g$", ha="left", color=CHOICE)
    say(ax, 7.75, y + 0.1, f"group $i_0 = {CHOSEN}$", ha="left", color=CHOICE)


def mixing(ax: Axes, y: float) -> None:
    """The experts of the chosen group mixed into one R×R matrix, and what a layer does with it."""
    heading(ax, y + 2.0, 4, r"Mixed: $M = \sum_j g_j \sum_p C_{jp}\; \mathcal{G}_{i_0 p}$", r"$R\!\times\!R$")
    middle = y + 0.35
    say(ax, 0.2, middle, r"$x' = x + \alpha\,\cdot$", ha="left", fontsize=18)
    box(ax, 2.75, middle - 0.17, 1.5, 0.34, SAMPLE)
    say(ax, 3.5, middle - 0.55, "$x$", color=SAMPLE)
    box(ax, 4.65, middle - 0.8, 0.55, 1.6, FACTOR)
    say(ax, 4.92, middle, "$U$")
    box(ax, 5.6, middle - 0.45, 0.9, 0.9, CHOICE)
    say(ax, 6.05, middle, "$M$", color=CHOICE)
    box(ax, 6.9, middle - 0.27, 1.6, 0.55, FACTOR)
    say(ax, 7.7, middle, r"$U^{\top}$")
    say(ax, 11.45, middle, r"$y = W x' + b$", ha="right", fontsize=17)


def draw() -> Figure:
    """The whole picture."""
    figure = Figure(figsize=(7.2, 8.7))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 11.65), ylim=(-0.7, 13.4))
    ax.set_axis_off()
    tensor(ax, 10.2)
    core_and_factors(ax, 6.95)
    routing(ax, 3.45)
    mixing(ax, 0)
    arrow(ax, (8.45, 4.6), (COLUMNS[CHOSEN] + 0.75, 7.15), CHOICE, bend=0.25)
    return figure


def main(argv: list[str] | None = None) -> Path:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    default = Path(__file__).parents[1] / "images" / "tensor.svg"
    parser.add_argument("-o", "--output", type=Path, default=default, help="file to write (.svg, .png, .pdf)")
    path = parser.parse_args(argv).output
    # Letters as outlines: the picture looks the same wherever it is shown. No date and a fixed salt: the same file.
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "tensor", "mathtext.fontset": "cm"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        draw().savefig(path, metadata=metadata, dpi=150)
    return path


if __name__ == "__main__":
    main()
