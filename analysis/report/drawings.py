"""Figures of the registry as parts of a section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.figures import FIGURES, Inputs, draw

from .markup import drawing, note


def drawn(
    name: str, inputs: Inputs, *, layer: str | None = None, tower: str | None = None, explained: bool = True
) -> str:
    """A figure of `analysis.figures.FIGURES` with its caption; a remark instead if it cannot be drawn.

    The ids inside are unique in the page for every name, layer and tower.
    """
    figure = FIGURES[name]
    inputs = inputs._replace(layer=layer or inputs.layer, tower=tower or inputs.tower)
    title = figure.title
    if layer is not None:
        title = f"{title.replace(' of a layer', '')}: {layer}"
    if tower:
        title = f"{title}, {tower}"
    try:
        canvas: Any = draw(name, inputs).figure
    except ValueError as error:
        return note(f"{title}: not drawn, since {error}.")
    # Names of layers are no identifiers, but their places are.
    place = "all" if inputs.adapter is None or layer is None else str(_place(inputs, layer))
    return drawing(canvas, f"{name}-{place}-{_tower_number(inputs, tower)}", title, figure.caption, explained=explained)


def drawn_layers(name: str, inputs: Inputs, layers: Sequence[str]) -> list[str]:
    """The same figure of several layers, explained once."""
    return [drawn(name, inputs, layer=layer, explained=layer == layers[0]) for layer in layers]


def side_by_side(*parts: str) -> str:
    """Parts beside each other where the page is wide."""
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def _place(inputs: Inputs, layer: str) -> int:
    return [each.name for each in inputs.adapter.layers].index(layer)  # type: ignore[union-attr]


def _tower_number(inputs: Inputs, tower: str | None) -> int:
    known = list(inputs.observed.routing) if inputs.observed is not None else []
    return known.index(tower) if tower in known else 0
