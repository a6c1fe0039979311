"""What of an adapter no fixed low-rank update can say."""

from __future__ import annotations

import warnings

from torch import nn

from .factors import layers_on_shared_input


def warn_of_shared_input(model: nn.Module, name: str) -> tuple[str, ...]:
    """Warn of layers whose experts act on relative positions otherwise than a LoRA would; returns their names."""
    layers = layers_on_shared_input(model, name)
    if layers:
        warnings.warn(
            f"{len(layers)} adapted layers, {layers[0]!r} first, are also applied to relative positions. With "
            "routing='sample' only the shared slice acts there, a LoRA or a merged weight acts there as anywhere else, "
            "so outputs differ from the routed model's: give a loader to measure by how much, or use routing='batch'",
            stacklevel=3,
        )
    return tuple(layers)
