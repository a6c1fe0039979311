"""The weights of base layers, of whatever storage, as far as an export needs them.

Shape legend: D input features, O output features, R rank (see `tucka.ops`).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

DENSE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that a weight is computed with as it is stored."""


def stored_weight(base_layer: nn.Module) -> Tensor | None:
    """The weight that a layer multiplies by, (O, D), in single precision at least; None if only its forward knows."""
    weight: Any
    package = type(base_layer).__module__.partition(".")[0]
    if package == "bitsandbytes":  # PEFT, asked of the layer, exchanges its weight, and eight bits cannot run with that
        held: Any = base_layer.weight
        weight = dequantize_bnb_weight(held, state=getattr(base_layer, "state", None))
    elif package == "hqq":
        weight = dequantize_module_weight(base_layer)
    elif type(base_layer) in (nn.Linear, Conv1D):  # a class of its own may compute what it likes from its weight
        weight = base_layer.weight
        if type(weight.data).__module__.startswith("torchao"):
            weight = dequantize_module_weight(base_layer)
    else:
        return None
    if weight.dtype not in DENSE or weight.is_meta:
        return None
    weight = at_least_single(weight.detach())
    return weight.mT if isinstance(base_layer, Conv1D) else weight


def at_least_single(tensor: Tensor) -> Tensor:
    """The tensor in its own precision or in single, whichever is more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def through_weight(
    base_layer: nn.Module,
    rows: Tensor,  # (R, D)
) -> Tensor:  # (R, O)
    """Rows times the weight of a layer, without its bias.

    Where the weight cannot be read, the layer is called on the rows and on zero, in the type it computes in.
    """
    weight = stored_weight(base_layer)
    if weight is not None:
        return at_least_single(rows).to(weight) @ weight.mT
    floats = [value for value in base_layer.state_dict().values() if value.dtype in DENSE]
    inputs = torch.cat([rows, torch.zeros_like(rows[:1])]).to(device_of_weight(base_layer, rows))
    inputs = inputs.to(floats[0].dtype) if floats else inputs
    outputs = at_least_single(base_layer(inputs))
    return outputs[:-1] - outputs[-1:]


def device_of_weight(base_layer: nn.Module, otherwise: Tensor) -> torch.device:
    """Where a layer takes its input."""
    devices = [value.device for value in base_layer.state_dict().values() if not value.is_meta]
    return devices[0] if devices else otherwise.device
