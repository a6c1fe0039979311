"""What an adapter trains, counted from its tensors, beside what other methods would train on the same layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from torch import nn

from analysis.adapters import Adapter, LayerExperts
from analysis.parameters import LayerShape, count
from analysis.tradeoffs import GROWTH
from tucka.model import layers_of

ANY_OUTPUT = ("hra", "oft")
"""Methods whose size does not depend on the layers' output features."""


def trained_parameters(adapter: Adapter) -> pd.DataFrame:
    """Trained parameters of an adapter by what they are for; heads and biases trained beside it are not among them.

    Columns ``part`` ("factors", "cores", "expert factors", "shared slices", "router") and ``parameters``.
    """
    config = adapter.config
    borrowers = config.factor_owners or {}
    held = config.trainable == "core"
    sizes = dict.fromkeys(("factors", "cores", "expert factors", "shared slices"), 0)
    for layer in adapter.layers:
        if layer.name not in borrowers and not held:
            modes = (layer.input_factor,) if _tied(layer, config) else (layer.input_factor, layer.output_factor)
            sizes["factors"] += config.trained(_rank(layer)) * sum(map(len, modes))
        width = config.block_width(_rank(layer))
        sizes["cores"] += layer.core[..., :width].numel()
        sizes["expert factors"] += layer.expert_factor.numel()
        sizes["shared slices"] += 0 if layer.shared is None else layer.shared[:, :width].numel()
        sizes["shared slices"] += 0 if layer.axes is None else layer.axes.numel()
    sizes["router"] = sum(router.centroids.numel() for router in adapter.routers)
    return pd.DataFrame(list(sizes.items()), columns=["part", "parameters"])


def shapes_of(model: nn.Module) -> list[LayerShape]:
    """Sizes of the adapted layers of a model."""
    return [LayerShape(layer.name, layer.in_features, layer.out_features) for layer in layers_of(model)]


def shapes_in(adapter: Adapter) -> list[LayerShape] | None:
    """Sizes of the adapted layers as far as the factors tell: additive ones have both, others only the input's."""
    if any(layer.form != "additive" for layer in adapter.layers):
        return None
    return [LayerShape(layer.name, *_features(layer)) for layer in adapter.layers]


def compared(adapter: Adapter, shapes: Sequence[LayerShape] | None) -> pd.DataFrame:
    """Other methods on the same layers, by closed forms: ``method`` (with its size), ``parameters`` and ``times``.

    ``times`` is how many times the adapter's own parameters that is. Without `shapes` only the methods whose size the
    input features decide are there; so are methods that do not fit these layers left out.
    """
    own, rank = int(trained_parameters(adapter)["parameters"].sum()), max(_rank(layer) for layer in adapter.layers)
    known = shapes or [LayerShape(layer.name, *_features(layer)) for layer in adapter.layers]
    wanted: list[tuple[str, str, dict[str, int]]] = [("LoRA", "lora", {"r": rank})]
    if shapes:
        equal = own // sum(shape.in_features + shape.out_features for shape in shapes)
        wanted += [("LoRA", "lora", {"r": equal})] if equal not in (0, rank) else []
    wanted += [("DoRA", "dora", {"r": rank}), ("VeRA", "vera", dict(GROWTH["vera"]))]
    wanted += [("HRA", "hra", {"r": rank}), ("OFT", "oft", dict(GROWTH["oft"]))]
    lines = [("TuckA (this adapter)", own, 1.0)]
    for name, method, hyper in wanted:
        size = _counted(known, method, hyper) if shapes or method in ANY_OUTPUT else None
        if size is not None:
            shown = ", ".join(f"{field.replace('_', ' ')}={value}" for field, value in hyper.items())
            lines.append((f"{name}, {shown}", size, size / own))
    experts = max(layer.groups * layer.experts for layer in adapter.layers)
    lora = _counted(known, "lora", {"r": rank}) if shapes else None
    if lora is not None and experts > 1:
        lines.append((f"{experts} separate LoRAs, r={rank}", experts * lora, experts * lora / own))
    return pd.DataFrame(lines, columns=["method", "parameters", "times"])


def _counted(shapes: Sequence[LayerShape], method: str, hyper: dict[str, Any]) -> int | None:
    try:
        return count(shapes, method, **hyper).total
    except ValueError:  # a rank or a block above a layer's width
        return None


def _tied(layer: LayerExperts, config: Any) -> bool:
    return layer.form == "multiplicative" and bool(config.tie_factors)


def _features(layer: LayerExperts) -> tuple[int, int]:
    return layer.input_factor.shape[0], layer.output_factor.shape[0]


def _rank(layer: LayerExperts) -> int:
    return layer.core.shape[-1]
