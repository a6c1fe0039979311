"""Sections that the weights alone tell: slices, similarity, spectra, norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from analysis.adapters import Adapter, LayerExperts
from analysis.figures import Inputs
from analysis.similarity import expert_norms, group_similarity
from analysis.spectra import effective_ranks

from .drawings import drawn, drawn_layers, side_by_side
from .markup import counted, digits, fixed, percent, table
from .page import Section


def core_slices(inputs: Inputs) -> Section:
    """The slices of chosen layers."""
    adapter: Any = inputs.adapter
    energies = [(layer, layer.core.square().sum(dim=(1, 2, 3)).numpy()) for layer in adapter.layers if is_finite(layer)]
    zero = sum(int((energy == 0).sum()) for _, energy in energies)
    total = sum(len(energy) for _, energy in energies)
    moved = [(energy / energy.sum(), layer) for layer, energy in energies if len(energy) > 1 and energy.sum() > 0]
    if not energies:
        sentence = "No core is finite, so nothing can be said of the slices."
    elif zero == total:
        sentence = (
            "Every slice is zero: the experts have not been trained, and the adapted model acts as its base model."
        )
    elif moved:
        share, layer = max(moved, key=lambda pair: pair[0].max())
        unused = f"; {counted(zero, 'group')} of {total} hold only zeros" if zero else ""
        sentence = (
            f"A group holds at most {percent(share.max())} of the energy of its layer's core (group "
            f"{share.argmax()} of {layer.name}; even shares are {percent(1 / len(share))}){unused}."
        )
    else:
        norms = [float(np.sqrt(energy.sum())) for _, energy in energies]
        lowest, highest = digits(min(norms)), digits(max(norms))
        sentence = f"There is one group per layer; the norms of the cores run from {lowest} to {highest}."
    layers = chosen_layers(adapter, inputs.layer)
    parts = side_by_side(*drawn_layers("core-slices", inputs, layers))
    return Section("core-slices", "Core slices", sentence, (parts,))


def similarity(inputs: Inputs) -> Section:
    """Whether experts differ."""
    adapter: Any = inputs.adapter
    frame = group_similarity(adapter)
    by_layer = frame.groupby("layer", sort=False)[["within", "across"]].mean().reset_index()
    known = by_layer.dropna(subset="across")
    if len(known):
        low, high = known.loc[known["across"].idxmin()], known.loc[known["across"].idxmax()]
        mean = known["across"].mean()
        sentence = f"Experts of different groups {_alike(mean)}: their mean cosine is {_signed(mean)}"
        if len(known) > 1:
            sentence += (
                f", from {_signed(low['across'])} in {low['layer']} to {_signed(high['across'])} in {high['layer']}"
            )
        sentence += "."
    elif by_layer["within"].notna().any():
        mean = by_layer["within"].mean()
        sentence = f"Every layer has one group, whose experts {_alike(mean)}: their mean cosine is {_signed(mean)}."
    elif all(layer.groups * layer.experts == 1 for layer in adapter.layers):
        sentence = "Every layer has a single expert, so there is nothing to compare it with."
    else:
        sentence = "The experts are zero or not finite, so they cannot be compared."
    layers = chosen_layers(adapter, inputs.layer)
    body = side_by_side(
        *drawn_layers("expert-similarity", inputs, layers),
        drawn("layer-group-similarity", inputs),
    )
    shown = table(
        by_layer.set_axis(["layer", "within groups", "across groups"], axis=1).dropna(axis=1, how="all"),
        "Mean cosine of experts",
        dict.fromkeys(("within groups", "across groups"), fixed(3)),
    )
    return Section("similarity", "Similarity of experts", sentence, (body, shown))


def ranks(inputs: Inputs) -> Section:
    """Was the rank worth it."""
    adapter: Any = inputs.adapter
    frame = effective_ranks(adapter)
    used = frame[frame["mode"].isin(("input", "output")) & frame["effective"].notna()]
    if used.empty:
        sentence = "The experts are zero or not finite, so they use none of their rank."
    else:
        share = float((used["effective"] / used["rank"]).mean())
        need, full = int(used["for_energy"].max()), int(used["rank"].max())
        held = (
            f"rank {need} would hold 90 % of the energy in every layer"
            if need < full
            else ("90 % of the energy needs the full rank in at least one layer")
        )
        sentence = (
            f"{_worth(share)}: on average an effective {used['effective'].mean():.1f} of "
            f"{used['rank'].mean():.3g} directions are used, and {held}."
        )
    wide = frame.pivot(index="layer", columns="mode", values=["effective", "for_energy"])
    wide = wide.reindex(frame["layer"].drop_duplicates())
    lines = pd.DataFrame({"layer": wide.index, "rank": [_rank_of(adapter, name) for name in wide.index]})
    full = frame.groupby("mode")["rank"].max()
    for mode in ("input", "output", "group", "expert"):
        if full[mode] == 1:  # a single group or expert uses all of its rank
            continue
        lines[f"{mode}: effective"] = wide["effective", mode].to_numpy()
        lines[f"{mode}: for 90\u00a0%"] = wide["for_energy", mode].to_numpy()
    formats = {name: fixed(1) for name in lines if str(name).endswith("effective")}
    shown = table(lines, "Effective ranks, and ranks that hold 90 % of the energy, by mode", formats)
    return Section("ranks", "Was the rank worth it?", sentence, (side_by_side(drawn("spectra", inputs)), shown))


def norms(adapter: Adapter) -> Section:
    """How large experts are."""
    lines = []
    for layer in adapter.layers:
        values = expert_norms(layer) * layer.alpha
        known = values[np.isfinite(values)]
        spread = (known.min(), np.median(known), known.max()) if known.size else (np.nan,) * 3
        shared = float(np.linalg.norm(_shared(layer))) * layer.alpha if layer.shared is not None else np.nan
        lines.append((layer.name, len(values), *spread, shared))
    frame = pd.DataFrame(lines, columns=["layer", "experts", "smallest", "median", "largest", "shared slice"])
    if all(layer.shared is None for layer in adapter.layers):
        frame = frame.drop(columns="shared slice")
    known = frame.dropna(subset="largest")
    if known.empty:
        sentence = "No expert is finite."
    elif known["largest"].max() == 0:
        sentence = "Every expert is zero."
    else:
        strong, weak = known.loc[known["median"].idxmax()], known.loc[known["median"].idxmin()]
        sentence = (
            f"The median expert is strongest in {strong['layer']} ({digits(strong['median'])}) and weakest in "
            f"{weak['layer']} ({digits(weak['median'])})."
        )
        if len(known) == 1:
            sentence = f"The median expert of {strong['layer']} has norm {digits(strong['median'])}."
        elif strong["median"] == weak["median"]:
            sentence = f"The median expert is as strong in every layer ({digits(strong['median'])})."
    shown = table(frame, "Frobenius norms of the experts times α, and of the always-active shared slice")
    return Section("norms", "Norms of experts", sentence, (shown,))


def chosen_layers(adapter: Adapter, layer: str | None) -> list[str]:
    """The layer asked for; else the first, the middle and the last."""
    if layer is not None:
        return [adapter.layer(layer).name]
    names = [each.name for each in adapter.layers]
    return list(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))


def is_finite(layer: LayerExperts) -> bool:
    """Whether a layer holds numbers only."""
    parts = (layer.core, layer.expert_factor, layer.input_factor, layer.output_factor, layer.shared)
    return all(part is None or bool(part.isfinite().all()) for part in parts)


def _shared(layer: LayerExperts) -> np.ndarray:
    """The shared slice between the triangles of its factors, whose norm is that of U S Vᵀ."""
    shared: Any = layer.shared
    read, write = (torch.linalg.qr(factor, mode="r").R for factor in (layer.input_factor, layer.output_factor))
    return (read @ shared @ write.mT).numpy()


def _rank_of(adapter: Adapter, name: str) -> int:
    return next(layer.core.shape[-1] for layer in adapter.layers if layer.name == name)


def _alike(cosine: float) -> str:
    limits = ((0.9, "do nearly the same"), (0.5, "do much the same"), (0.1, "are somewhat alike"))
    word = next((word for limit, word in limits if cosine > limit), "have little in common")
    return word if cosine >= -0.1 else "point partly in opposite directions"


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # + 0.0 drops the sign of a zero


def _worth(share: float) -> str:
    if share > 0.8:
        return "The rank is used up, and a higher one may pay"
    return "Most of the rank is used" if share > 0.5 else "Less than half of the rank is used"
