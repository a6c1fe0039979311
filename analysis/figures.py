"""Single figures by name: what each needs, how it is drawn, and how to read it.

Thin over the measures, which compute, and the plots, which draw. Figures are made without pyplot: they need no display
and nothing has to be closed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from tucka import TuckAConfig

from . import plots, routes, similarity, tradeoffs
from .adapters import Adapter, LayerExperts
from .observations import Observations, expert_movement
from .spectra import layer_spectra

WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
"""Widths of layers that "parameters" compares methods at."""

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that no XML document, and so no SVG, can hold, or that break a line."""


class Inputs(NamedTuple):
    """What figures are drawn from; a figure needs only some of it.

    Attributes
    ----------
    adapter : Adapter, optional
    observed : Observations, optional
        The adapter on data.
    log : sequence of dict, optional
        Log history of a Trainer.
    runs : DataFrame, optional
        One row per training run.
    layer : str, optional
        Name of the layer to draw, or its end; default: the first.
    tower : str, optional
        Whose router, for models with several.
    columns : mapping
        Columns of the runs that hold "method", "parameters" and "score", where they are not called so.
    """

    adapter: Adapter | None = None
    observed: Observations | None = None
    log: Sequence[Mapping[str, Any]] | None = None
    runs: pd.DataFrame | None = None
    layer: str | None = None
    tower: str | None = None
    columns: Mapping[str, str] = {}

    @property
    def experts(self) -> LayerExperts:
        """The experts of the layer to draw."""
        adapter = given(self.adapter, "adapter")
        return adapter.layers[0] if self.layer is None else adapter.layer(self.layer)


class Figure(NamedTuple):
    """A figure that can be asked for by name.

    Attributes
    ----------
    title : str
        What it is, in a few words.
    caption : str
        One sentence: what it shows and how to read it.
    needs : tuple of str
        Of "adapter", "observed", "labels", "log" and "runs".
    plot : callable
        Draws `Inputs` on axes.
    """

    title: str
    caption: str
    needs: tuple[str, ...]
    plot: Callable[[Inputs, Axes], Axes]


def draw(name: str, inputs: Inputs, ax: Axes | None = None) -> Axes:
    """Draw a figure of `FIGURES`; without axes, in a new matplotlib figure (``ax.figure``) of the style's size.

    Raises
    ------
    ValueError
        If there is no such figure, or something it needs is missing.
    """
    if name not in FIGURES:
        raise ValueError(f"figure is one of {', '.join(FIGURES)}, got {name!r}")
    held = {
        "adapter": inputs.adapter,
        "observed": inputs.observed,
        "labels": None if inputs.observed is None else inputs.observed.labels,
        "log": inputs.log,
        "runs": inputs.runs,
    }
    missing = [need for need in FIGURES[name].needs if held[need] is None]
    if missing:
        raise ValueError(f"figure {name!r} needs {' and '.join(SOURCES[need] for need in missing)}")
    return FIGURES[name].plot(inputs, Canvas(layout="constrained").subplots() if ax is None else ax)


def given(value: Any, name: str) -> Any:
    """A value that a figure needs; `ValueError` if it is missing."""
    if value is None:
        raise ValueError(f"the figure needs {SOURCES[name]}")
    return value


def plain(name: Any) -> str:
    """A name from a file as matplotlib shows it as it is: no mathematics, nothing that an SVG cannot hold."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(name)).replace("$", r"\$")


def plain_layers(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose layers have plain names."""
    return table.assign(layer=table["layer"].map(plain))


def plain_labels(labels: np.ndarray) -> np.ndarray:
    """Labels with plain names; numbers stay numbers."""
    return labels if labels.dtype.kind in "biuf" else np.array([plain(label) for label in labels])


def ranks_used(inputs: Inputs) -> tuple[pd.DataFrame, int | dict[str, int]]:
    """The spectra of all layers, and their ranks: one number where all have the same."""
    table = plain_layers(layer_spectra(inputs.adapter))  # type: ignore[arg-type]
    ranks = {plain(layer.name): layer.core.shape[-1] for layer in inputs.adapter.layers}  # type: ignore[union-attr]
    return table, (next(iter(ranks.values())) if len(set(ranks.values())) == 1 else ranks)


# --- the figures ---------------------------------------------------------------------------------------------------


def _core_slices(inputs: Inputs, ax: Axes) -> Axes:
    return plots.core_slices(inputs.experts.core.numpy(), ax=ax)


def _expert_similarity(inputs: Inputs, ax: Axes) -> Axes:
    layer = inputs.experts
    return plots.expert_similarity(similarity.expert_similarity(layer), similarity.groups_of(layer), ax=ax)


def _expert_cka(inputs: Inputs, ax: Axes) -> Axes:
    observed: Any = inputs.observed
    if not observed.layers:
        raise ValueError("no forward of the data reached an adapted layer")
    name = next(iter(observed.layers)) if inputs.layer is None else observed.adapter.layer(inputs.layer).name
    if name not in observed.layers:
        raise ValueError(f"no forward of the data reached layer {name!r}")
    layer = observed.adapter.layer(name)
    cka = similarity.output_cka(layer, observed.layers[name].covariance)
    return plots.expert_similarity(cka, similarity.groups_of(layer), measure="cka", ax=ax)


def _layer_group_similarity(inputs: Inputs, ax: Axes) -> Axes:
    table = similarity.group_similarity(inputs.adapter)  # type: ignore[arg-type]
    # A single group has no others to be compared with.
    value = "within" if table["across"].isna().all() else "across"
    return plots.layer_group_similarity(plain_layers(table), value=value, ax=ax)


def _spectra(inputs: Inputs, ax: Axes) -> Axes:
    table, chosen = ranks_used(inputs)
    return plots.spectrum(table, mode="input", chosen=chosen, ax=ax)


def _router_map(inputs: Inputs, ax: Axes) -> Axes:
    observed: Any = inputs.observed
    mapped = routes.router_map(observed, inputs.tower)
    labels = observed.labels
    # Batches routed as one have no label of their own.
    if labels is not None and len(labels) == len(mapped.groups):
        return plots.router_map(mapped, labels=plain_labels(labels), ax=ax)
    return plots.router_map(mapped, ax=ax)


def _load(inputs: Inputs, ax: Axes) -> Axes:
    history = routes.load_history(inputs.log, tower=inputs.tower)  # type: ignore[arg-type]
    if history.empty:
        raise ValueError(
            "the log holds no loads of groups; train with tucka.callbacks.BalanceCallback, and name the tower if the "
            "model has several"
        )
    return plots.load_over_time(history, ax=ax)


def flow_table(observed: Observations, tower: str | None = None) -> pd.DataFrame:
    """Labels by groups, as counts, labels with plain names.

    Raises
    ------
    ValueError
        If there are no labels, or routes are of whole batches.
    """
    if observed.labels is None:
        raise ValueError(f"the figure needs {SOURCES['labels']}")
    groups = observed.routing[routes.tower_of(observed, tower)].group
    if len(groups) != len(observed.labels):
        raise ValueError(
            f"the adapter routes whole batches, so {len(groups)} routes cannot be set against "
            f"{len(observed.labels)} labels of samples"
        )
    return routes.label_table(groups, plain_labels(observed.labels), observed.adapter.config.k)


def _flow(inputs: Inputs, ax: Axes) -> Axes:
    return plots.label_group_flow(flow_table(inputs.observed, inputs.tower), ax=ax)  # type: ignore[arg-type]


def _movement(inputs: Inputs, ax: Axes) -> Axes:
    table = expert_movement(inputs.observed)  # type: ignore[arg-type]
    return plots.activation_movement(plain_layers(table), ax=ax)


def _parameters(inputs: Inputs, ax: Axes) -> Axes:
    config = None
    if inputs.adapter is not None:
        own = inputs.adapter.config
        # Only what sizes depend on: layer names and patterns of the adapter mean nothing on square layers.
        config = TuckAConfig(**{name: getattr(own, name) for name in tradeoffs.SIZE_FIELDS}, k=own.k)
    # No layer is narrower than the rank of its experts.
    widths = [width for width in WIDTHS if config is None or width >= config.r]
    return plots.parameter_scaling(tradeoffs.parameter_scaling("width", widths, config=config), ax=ax)


def _trade_off(inputs: Inputs, ax: Axes) -> Axes:
    runs: Any = inputs.runs
    table = tradeoffs.trade_off(runs, **inputs.columns)
    return plots.trade_off(table.assign(method=table["method"].map(plain)), ax=ax)


def _expert_scaling(inputs: Inputs, ax: Axes) -> Axes:
    runs: Any = inputs.runs
    series = "r" if "r" in runs and runs["r"].nunique() > 1 else None
    return plots.expert_scaling(tradeoffs.expert_counts(runs, series, inputs.columns.get("score", "score")), ax=ax)


SOURCES = {
    "adapter": "an adapter (--adapter DIR)",
    "observed": "an adapter on data (--adapter DIR --data FILE, and --model if its base model is not found)",
    "labels": "labels of the data (--labels KEY)",
    "log": "the log of a training (--log trainer_state.json)",
    "runs": "a table of runs (--runs FILE.csv)",
}
"""What a figure may need, and the options of the command line that give it."""

FIGURES: dict[str, Figure] = {
    "core-slices": Figure(
        "Core slices of a layer",
        "What each group of experts learnt: one column of R×R heat maps per group, red for positive and blue for "
        "negative entries; columns that look alike are groups that learnt the same.",
        ("adapter",),
        _core_slices,
    ),
    "expert-similarity": Figure(
        "Similarity of the experts of a layer",
        "Cosine between every two experts, ordered by group: red off the diagonal means two experts that do the same, "
        "white that they have nothing in common, blue that they undo each other.",
        ("adapter",),
        _expert_similarity,
    ),
    "layer-group-similarity": Figure(
        "Similarity of groups, layer by layer",
        "Mean cosine of every group's experts with those of the other groups (with their own if there is one group): "
        "the redder a row, the less the groups of that layer differ.",
        ("adapter",),
        _layer_group_similarity,
    ),
    "spectra": Figure(
        "Spectra of the layers",
        "Singular values of each layer's experts on the input side, relative to the largest: a curve that falls early "
        "needs less rank than it was given, one still high at its end could use more.",
        ("adapter",),
        _spectra,
    ),
    "router-map": Figure(
        "Map of the router",
        "Samples by their two leading principal components, coloured by the group that serves them, among the "
        "numbered centroids: clusters of one colour are kinds of data the router tells apart.",
        ("observed",),
        _router_map,
    ),
    "load": Figure(
        "Load over training",
        "Share of the training samples that each group served: lines near the dashed one are evenly used groups, a "
        "line at zero is a dead one.",
        ("log",),
        _load,
    ),
    "flow": Figure(
        "From labels to groups",
        "Where the samples of each label go: a label whose band stays whole is served by one group, and a group fed by "
        "several bands shares its experts among them.",
        ("observed", "labels"),
        _flow,
    ),
    "movement": Figure(
        "Movement of the activations",
        "How far each group's experts move a layer's activations, as a share of their length: high points are layers "
        "that the adaptation relies on.",
        ("observed",),
        _movement,
    ),
    "expert-cka": Figure(
        "Similarity of the experts' outputs on the data",
        "Linear CKA of what every two experts of a layer put out on the same data: 1 (red) is the same up to rotation "
        "and scale, 0 (white) has nothing in common.",
        ("observed",),
        _expert_cka,
    ),
    "parameters": Figure(
        "Trained parameters against width",
        "Parameters that each method trains on 24 square layers as they grow wider: the lower line is the smaller "
        "adapter, and parallel lines grow alike.",
        (),
        _parameters,
    ),
    "trade-off": Figure(
        "Score against size",
        "Mean score of every method against the parameters it trains: what lies on the dashed front is not beaten by "
        "anything as small.",
        ("runs",),
        _trade_off,
    ),
    "expert-scaling": Figure(
        "Score against the number of experts",
        "Mean score as the number of experts K·T grows: a rising curve says that more experts pay.",
        ("runs",),
        _expert_scaling,
    ),
}
"""The figures, by the names that the command line knows."""
