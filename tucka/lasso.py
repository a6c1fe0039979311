"""Tensor lasso: a penalty that drives columns of the factors to zero, and so ranks down.

Shape legend: P rank shared in a group, R rank of an expert (see `tucka.ops`).

It is tensorly-torch's ``TuckerLasso``: a weight w that starts at 1 beside every column of a factor, held in [−1, 1],
and λ Σ|w| / n added to the loss. Not taken over: its forward hook replaces the tensor by one of raw factors, which the
mixing of a route never reads; its threshold sets every negative weight to zero; its sum goes on from step to step
unless it is reset.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .processes import whole

THRESHOLD = 1e-6
"""Weights nearer to zero than this are set to zero, as in tensorly-torch."""

NO_LOSS = (
    "the model returned no loss to add the penalty of lasso=… to, as with a trainer that takes the loss itself; it "
    "has no effect unless that loss adds tucka.ranks.lasso_penalty(model)"
)


def add_penalty(model: nn.Module, layers_of: Callable) -> None:
    """Let a base model hold its lasso weights in range, and add their penalty to its loss, in training forwards."""
    remove_penalty(model)
    model.register_forward_pre_hook(partial(_project, layers_of))
    model.register_forward_hook(partial(_add, layers_of))


def remove_penalty(model: nn.Module) -> None:
    """Undo `add_penalty`."""
    hooks: Any
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, partial) and hook.func in (_project, _add)]:
            del hooks[key]


def penalty_of(layers: list[Any]) -> Tensor | None:
    """λ times the mean absolute value of all weights of the active adapters; None where there are none."""
    found = [(experts.lasso, whole(weight)) for experts in _active(layers) for weight in experts.lasso_weights]
    if not found:
        return None
    device = found[0][1].device
    total = torch.stack([penalty * weight.abs().sum().to(device) for penalty, weight in found]).sum()
    return total / sum(weight.numel() for _, weight in found)


def _active(layers: list[Any]) -> list[Any]:
    return [
        layer.tucka_experts[name]
        for layer in layers
        if not layer.disable_adapters
        for name in layer.active_adapters
        if name in layer.tucka_experts
    ]


def _trains(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled()


def _project(layers_of: Callable, module: nn.Module, args: tuple) -> None:
    """Before a forward and never in it: a graph under way holds the weights."""
    if not _trains(module):
        return
    with torch.no_grad():
        for weight in (weight for experts in _active(layers_of(module)) for weight in experts.lasso_weights):
            if weight.requires_grad:
                weight.clamp_(-1, 1).masked_fill_(weight.abs() < THRESHOLD, 0)


def _add(layers_of: Callable, module: nn.Module, args: tuple, output: Any) -> None:
    """As transformers' mixtures of experts add their auxiliary loss: to `output.loss`, where there is one."""
    penalty = penalty_of(layers_of(module)) if _trains(module) else None
    if penalty is None:
        return
    if isinstance(output, (ModelOutput, dict)) and output.get("loss") is not None:
        output["loss"] = output["loss"] + penalty.to(output["loss"])
    elif not torch.compiler.is_compiling():
        warnings.warn(NO_LOSS, stacklevel=2)
