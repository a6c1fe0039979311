"""bitsandbytes' 4-bit layers, held in the layout that can be trained through, read and saved.

On CPUs with AVX512-BF16 an evaluation repacks their weights for a kernel of its own (bitsandbytes 0.50). A repacked
layer passes no gradient on, in later training either; what reads its weight, as PEFT's merging does, takes the numbers
in another order; and `state_dict`, which every saving calls, puts the weight back inexactly, or with its scales in
another order. So an adapted model has that kernel off, and computes there what it computes on any other CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SWITCH = "support_avx512bf16_for_cpu"
"""Attribute of a 4-bit layer: whether its evaluations on a CPU may repack it."""


def keep_layout(model: nn.Module) -> None:
    """Keep every 4-bit layer of a model from being repacked, and put back those that were."""
    for module in model.modules():
        if getattr(module, SWITCH, False):
            setattr(module, SWITCH, False)
            _unpack(module)


def _unpack(layer: Any) -> None:
    state = layer.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return
    scales = state.absmax.mT.to(torch.float32).flatten()  # one for each block of a row, as they were quantised
    state.original_nested = False  # repacking has lost the scales of the scales; new ones would change the weight again
    layer.state_dict()  # bitsandbytes' own way back, right for all but the scales
    layer.weight.quant_state.absmax = scales
