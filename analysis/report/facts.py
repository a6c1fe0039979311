"""Sections on what was configured and how large it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.adapters import Adapter
from analysis.parameters import LayerShape
from tucka import TuckAConfig

from .accounting import compared, shapes_in, trained_parameters
from .drawings import side_by_side
from .markup import counted, digits, fixed, percent, table, tiles
from .page import Section
from .weights import is_finite

HIDDEN = ("factor_owners", "format_version")
"""Fields that the library writes for itself."""


def configuration(adapter: Adapter) -> Section:
    """What was configured, and whether the file is sound."""
    config = adapter.config
    widest = max(adapter.layers, key=lambda layer: layer.groups * layer.experts)
    routers = {0: "no router chooses between them", 1: f"one router chooses a group for every {config.routing}"}
    chosen = routers.get(
        len(adapter.routers), f"{len(adapter.routers)} routers choose a group for every {config.routing}"
    )
    sentence = (
        f"{counted(len(adapter.layers), 'layer')} carry {counted(widest.groups, 'group')} of "
        f"{counted(widest.experts, 'expert')} each, of rank {_ranks(adapter)}; {chosen}."
    )
    if len(adapter.layers) == 1:
        sentence = sentence.replace(" carry ", " carries ")
    fields = TuckAConfig.__dataclass_fields__
    lines = [
        (name, _shown(getattr(config, name)), fields[name].metadata["help"])
        for name in fields
        if "help" in fields[name].metadata and name not in HIDDEN
    ]
    lines.insert(0, ("base model", _shown(config.base_model_name_or_path), "What the adapter was trained on."))
    facts = {
        "adapted layers": digits(len(adapter.layers)),
        "groups × experts": f"{widest.groups} × {widest.experts}",
        "rank": _ranks(adapter),
        "trained parameters": digits(trained_parameters(adapter)["parameters"].sum()),
    }
    frame = pd.DataFrame(lines, columns=["field", "value", "meaning"])
    broken = [layer.name for layer in adapter.layers if not is_finite(layer)]
    notes = []
    if broken:
        notes.append(
            f"{len(broken)} of {counted(len(adapter.layers), 'layer')} hold values that are not finite "
            f"({', '.join(broken[:3])}{', …' if len(broken) > 3 else ''}): the training diverged, or the file is "
            "damaged. Measures leave them out."
        )
    return Section(
        "configuration", "Configuration", sentence, (tiles(facts), table(frame, "Configuration")), tuple(notes)
    )


def parameters(adapter: Adapter, shapes: Sequence[LayerShape] | None) -> Section:
    """How many parameters were trained, and what other methods train."""
    parts, known = trained_parameters(adapter), shapes or shapes_in(adapter)
    own = int(parts["parameters"].sum())
    largest = parts.loc[parts["parameters"].idxmax()]
    others = compared(adapter, known)
    sentence = (
        f"The adapter trains {own:,} parameters, {percent(largest['parameters'] / own)} of them in its "
        f"{largest['part']}"
    )
    notes: tuple[str, ...] = ()
    if known:
        lora = others[others["method"].str.startswith("LoRA")].iloc[0]
        sentence += f"; {lora['method'].replace(', ', ' of ', 1)} would train {lora['times']:.2g} times as many."
    else:
        sentence += "."
        notes = (
            "Methods whose size depends on the layers' output features (LoRA, DoRA, VeRA) need the model: add --model.",
        )
    shares = parts.assign(share=parts["parameters"] / own)
    body = (
        side_by_side(
            table(others, "Trained parameters of methods on these layers", {"times": fixed(2)}),
            table(shares, "Where the adapter's parameters are", {"share": percent}),
        ),
    )
    return Section("parameters", "Parameters", sentence, body, notes)


def _ranks(adapter: Adapter) -> str:
    found = sorted({layer.core.shape[-1] for layer in adapter.layers})
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, (set, list, tuple)):
        return ", ".join(sorted(map(str, value)))
    return ", ".join(f"{key}: {each}" for key, each in value.items()) if isinstance(value, dict) else str(value)
