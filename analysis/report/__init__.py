"""The report: one self-contained HTML page on an adapter, from its weights and whatever else is at hand.

`report` returns the page, `write_report` writes it to a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from analysis.figures import Inputs
from analysis.parameters import LayerShape
from analysis.styles import style

from . import facts, on_data, over_training, weights
from .files import write_atomically
from .page import Section, page

__all__ = ["report", "write_report"]

LOOK: Any = {"figure.figsize": (4.4, 2.9), "axes.facecolor": "none"}
"""Figures are narrow enough to be read on a phone, and axes show the card they lie on, grey on a dark page."""


def report(inputs: Inputs, *, shapes: Sequence[LayerShape] | None = None) -> str:
    """Write the page: what the weights alone tell; and with data, with labels and with a log, what these add.

    Parameters
    ----------
    inputs : Inputs
        The adapter, and optionally the adapter on data (`observed`) and a log history (`log`). `layer` chooses the
        layer whose slices and experts are drawn; by default the first, the middle and the last.
    shapes : sequence of LayerShape, optional
        Sizes of the adapted layers in the model, to count other methods' parameters by.

    Returns
    -------
    str
        An HTML document.

    Raises
    ------
    ValueError
        If there is no adapter, or no layer of that name.
    """
    adapter = inputs.adapter
    if adapter is None:
        raise ValueError("a report is on an adapter, but none was given")
    with style("notebook"), mpl.rc_context(LOOK):
        sections = [
            facts.configuration(adapter),
            facts.parameters(adapter, shapes),
            *_on_data(inputs),
            *_over_training(inputs),
            weights.ranks(inputs),
            weights.similarity(inputs),
            weights.core_slices(inputs),
            weights.norms(adapter),
        ]
    base = adapter.config.base_model_name_or_path
    under = "What the experts learnt, whether they differ, who uses them, and whether the rank was worth it"
    return page(
        f"Adapter “{adapter.name}”", f"{under}{f'; base model {base}' if base else ''}.", sections, _missing(inputs)
    )


def write_report(path: str | Path, inputs: Inputs, *, shapes: Sequence[LayerShape] | None = None) -> Path:
    """Write `report` to a file, which is replaced only once the page is whole."""
    text = report(inputs, shapes=shapes)
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _on_data(inputs: Inputs) -> list[Section]:
    observed: Any = inputs.observed
    if observed is None:
        return []
    sections = [on_data.routing(inputs, tower) for tower in observed.routing]
    if observed.layers:
        sections += [on_data.movement(inputs), on_data.outputs(inputs)]
    return sections


def _over_training(inputs: Inputs) -> list[Section]:
    towers = [] if inputs.log is None else over_training.towers_in(inputs.log)
    return [over_training.load(inputs, tower) for tower in towers]


def _missing(inputs: Inputs) -> list[str]:
    """What is not there, and how to have it."""
    observed, log = inputs.observed, inputs.log
    found = []
    if observed is None:
        found.append(
            "Routing, movement of the activations and similarity of outputs need data: add --data FILE (and --model, "
            "if the base model is not found)."
        )
    elif not observed.routing:
        found.append("Routing is missing: the adapter has no router, or no forward of the data reached it.")
    if log is None:
        found.append("Load over training needs the log of the training: add --log trainer_state.json.")
    elif not over_training.towers_in(log):
        found.append(over_training.NO_LOADS)
    return found
