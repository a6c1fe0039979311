"""Sections that need data: who is routed where, how far experts move activations, how alike their outputs are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.figures import Inputs, flow_table
from analysis.observations import Observations, RoutingObservation, group_movement
from analysis.routes import mutual_information
from analysis.similarity import groups_of, output_cka

from .drawings import drawn, drawn_layers, side_by_side
from .markup import counted, fixed, percent, table
from .page import Section
from .weights import chosen_layers

ADD_LABELS = "Which classes, domains or tasks go to which group is shown if the data has labels: add --labels KEY."


def routing(inputs: Inputs, tower: str) -> Section:
    """Loads, the router map, and labels against groups, of one tower."""
    observed: Any = inputs.observed
    config, seen = observed.adapter.config, observed.routing[tower]
    unit = "sample" if config.routing == "sample" else "batch"
    counts = np.bincount(seen.group, minlength=config.k)
    shares = counts / counts.sum()
    sentence = _load_sentence(counts, unit)
    frame = pd.DataFrame(
        {
            "group": [str(group) for group in range(config.k)],
            f"{unit}s" if unit == "sample" else "batches": counts,
            "share": shares,
            "sum of gates": _gates(seen, config.k),
        }
    )
    shown = table(
        frame, f"Load per group (even: {percent(1 / config.k)})", {"share": percent, "sum of gates": fixed(3)}
    )
    notes: list[str] = []
    plots = [drawn("router-map", inputs, tower=tower or None)]
    parts = [shown]
    if observed.labels is None:
        notes.append(ADD_LABELS)
    elif len(observed.labels) != len(seen.group):
        notes.append(
            f"The adapter routes whole batches: {len(seen.group)} routes cannot be set against the labels of "
            f"{len(observed.labels)} samples."
        )
    else:
        flow = flow_table(observed, tower)
        sentence += " " + _agreement(mutual_information(flow), flow)
        plots.append(drawn("flow", inputs, tower=tower or None))
        by_label = flow.div(flow.sum(axis=1), axis=0).rename(columns=lambda group: f"group {group}").reset_index()
        by_label["label"] = [str(label).replace(r"\$", "$") for label in by_label["label"]]
        by_label.insert(1, "samples", flow.sum(axis=1).to_numpy())
        formats = {name: percent for name in by_label if str(name).startswith("group ")}
        parts.append(table(by_label, "Share of every label's samples that each group serves", formats))
    title = f"Routing: {tower}" if tower else "Routing"
    key = f"routing-{list(observed.routing).index(tower)}"
    return Section(key, title, sentence, (side_by_side(*plots), side_by_side(*parts)), tuple(notes))


def movement(inputs: Inputs) -> Section:
    """How far the update moves activations."""
    observed: Any = inputs.observed
    frame = group_movement(observed)
    known = frame[np.isfinite(frame["movement"])]
    if known.empty:
        sentence = "No movement of the activations could be measured: the update is not finite."
    else:
        by_layer = known.groupby("layer", sort=False)["movement"].mean()
        overall = np.average(known["movement"], weights=known["rows"])
        sentence = (
            f"The update moves activations by {percent(overall)} of their length on average, most in "
            f"{by_layer.idxmax()} ({percent(by_layer.max())}) and least in {by_layer.idxmin()} "
            f"({percent(by_layer.min())})."
        )
        if len(by_layer) == 1:
            sentence = f"The update moves activations by {percent(overall)} of their length on average."
    wide = frame.pivot(index="layer", columns="group", values="movement").reindex(frame["layer"].drop_duplicates())
    wide = wide.rename(columns=lambda group: f"group {group}").reset_index()
    shown = table(
        wide,
        "Mean movement ‖z′ − z‖ / ‖z‖ by the whole update, the shared slice included",
        {str(name): percent for name in wide.columns[1:]},
    )
    missing = [layer.name for layer in observed.adapter.layers if layer.name not in observed.layers]
    notes = (f"No forward of the data reached {', '.join(missing)}.",) if missing else ()
    return Section(
        "movement", "Movement of the activations", sentence, (side_by_side(drawn("movement", inputs)), shown), notes
    )


def outputs(inputs: Inputs) -> Section:
    """Whether experts put out different things on the data."""
    observed: Any = inputs.observed
    frame = pd.DataFrame(
        [(name, *_cka_means(observed, name)) for name in observed.layers],
        columns=["layer", "within groups", "across groups"],
    )
    known = frame.dropna(subset="across groups")
    if len(known):
        mean = known["across groups"].mean()
        word = "nearly the same" if mean > 0.9 else "similar" if mean > 0.5 else "different"
        sentence = (
            f"On this data, experts of different groups put out {word} things: their mean CKA is {mean:.2f}, "
            f"between {known['across groups'].min():.2f} and {known['across groups'].max():.2f} in single layers."
        )
    elif frame["within groups"].notna().any():
        sentence = (
            f"Every layer has one group, whose experts' outputs have a mean CKA of {frame['within groups'].mean():.2f}."
        )
    else:
        sentence = "There are no two experts with finite outputs to compare."
    layers = [name for name in chosen_layers(observed.adapter, inputs.layer) if name in observed.layers]
    body = side_by_side(*drawn_layers("expert-cka", inputs, layers))
    shown = table(
        frame.dropna(axis=1, how="all"), "Mean linear CKA of outputs", dict.fromkeys(frame.columns[1:], fixed(3))
    )
    return Section("outputs", "Similarity of outputs on the data", sentence, (body, shown))


def _load_sentence(counts: np.ndarray, unit: str) -> str:
    total, shares = int(counts.sum()), counts / counts.sum()
    seen = f"{total:,} {unit if total == 1 else 'batches' if unit == 'batch' else unit + 's'}"
    if len(counts) == 1:
        return f"The only group serves all {seen}."
    unused = int((counts == 0).sum())
    rest = f"{counted(unused, 'group is', 'groups are')} unused" if unused else "no group is unused"
    return (
        f"Of {seen}, group {shares.argmax()} serves the most ({percent(shares.max())}) and group {shares.argmin()} the "
        f"fewest ({percent(shares.min())}), where even shares are {percent(1 / len(counts))}; {rest}."
    )


def _agreement(shared: dict[str, float], flow: pd.DataFrame) -> str:
    """How much labels say about groups; what can agree needs two of each."""
    if min(flow.shape) < 2:
        return "With a single label or group there is no agreement to measure."
    value = shared["normalised"]
    word = "almost entirely" if value > 0.8 else "largely" if value > 0.4 else "somewhat" if value > 0.1 else "hardly"
    return (
        f"The label {word} decides the group: their mutual information is {shared['bits']:.2f} bits, "
        f"{percent(value)} of the mean of both entropies."
    )


def _gates(seen: RoutingObservation, groups: int) -> list[float]:
    """Mean over a group's units of the sum of its gates' magnitudes, as they act."""
    sums = np.abs(seen.gates).sum(axis=1)
    return [
        float(sums[seen.group == group].mean()) if (seen.group == group).any() else np.nan for group in range(groups)
    ]


def _cka_means(observed: Observations, name: str) -> tuple[float, float]:
    layer = observed.adapter.layer(name)
    cka, groups = output_cka(layer, observed.layers[name].covariance), groups_of(layer)
    same = groups[:, None] == groups
    apart = ~np.eye(len(groups), dtype=bool)
    return _mean(cka[same & apart]), _mean(cka[~same])


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")
