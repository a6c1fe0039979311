"""The mixes M of several layers at once.

A layer's M is R×R work in some thirty operations, each too small to be worth its call. Layers of one forward share the
route, so those whose cores have one shape are stacked and mixed together.

Shape legend: L layers, N routed units, K groups, T experts in a group, P rank shared in a group, R rank, H width of a
core's diagonal blocks (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops

if TYPE_CHECKING:
    from .tensors import ExpertTensor

Modes = tuple[Tensor, Tensor]


def mix_layers(
    layers: Sequence[ExpertTensor],  # L, of one kind (see `kind_of`)
    group: Tensor | None,  # (N,)
    gates: Tensor | None,  # (N, T)
    modes: Sequence[Modes] | None = None,  # L pairs of (D, R) and (O, R)
) -> Tensor:  # (L, N, R, R)
    """M of every unit in every layer, so that x U M Vᵀ is its update; norms of C, U and V are folded in.

    With no route (None) it is the shared slice alone, (L, 1, R, R). `modes` are U and V, where they are not the layers'
    own tensors.
    """
    first = layers[0]
    mix = shared_slices(layers)
    if group is not None and gates is not None:
        expert_LTP = torch.stack([layer.expert_factor for layer in layers])
        routed = ops.mix_experts(_selected_cores(layers, group), expert_LTP, gates.to(expert_LTP.dtype))
        if first.normalize:
            norm = ops.safe_product(torch.linalg.vector_norm(expert_LTP, dim=(1, 2)))
            routed = routed * (_bound(first, first.core.shape[1]) / norm).view(-1, 1, 1, 1)
        mix = routed if mix is None else routed + mix
    elif mix is None:
        mix = first.core.new_zeros(len(layers), 1, *first.core.shape[-2:])
    if first.normalize:
        norms = _mode_norms(layers, modes, first.core.device)
        mix = mix * (_bound(first, first.core.shape[-2]) ** 2 / norms).view(-1, 1, 1, 1)
    return ops.block_diagonal(mix)


def kind_of(layer: ExpertTensor) -> tuple:
    """What layers mixed together have in common."""
    core, scaling = layer.core, (layer.normalize, layer.core_gain)
    return core.shape, core.dtype, core.device, layer.shared_core is None, len(layer.lasso_weights), *scaling


def _selected_cores(layers: Sequence[ExpertTensor], group: Tensor) -> Tensor:  # (L, N, P, R, H)
    """Cores as they act, of the group of each unit; selecting is tensor indexing, so no value leaves the device."""
    first = layers[0]
    # A compiled or exported graph serves all batch sizes, so it must not choose by this one.
    if torch.compiler.is_compiling() or first.core.shape[0] <= group.shape[0]:
        core_LKPRH = torch.stack([layer.core for layer in layers])
        return acting_cores(layers, core_LKPRH).index_select(1, group)
    # With more groups than units most cores are nobody's: these few are taken first.
    return acting_cores(layers, torch.stack([layer.core.index_select(0, group) for layer in layers]))


def acting_cores(layers: Sequence[ExpertTensor], core: Tensor) -> Tensor:
    """Stacked cores (L, ·, P, R, H) as they act."""
    return weigh_cores(layers, ops.scale_core(core, (-3, -2, -1), layers[0].normalize, layers[0].core_gain))


def shared_slices(layers: Sequence[ExpertTensor]) -> Tensor | None:  # (L, 1, R, H)
    """The always-active slices as they act, if the layers have them."""
    slices = [layer.shared_core for layer in layers if layer.shared_core is not None]
    if not slices:
        return None
    stacked, first = torch.stack(slices).unsqueeze(1), layers[0]
    return weigh_slices(layers, ops.scale_core(stacked, (-2, -1), first.normalize, first.core_gain))


def weigh_cores(layers: Sequence[ExpertTensor], core: Tensor) -> Tensor:
    """Stacked cores (L, ·, P, R, H) under the weights of a tensor lasso, if the layers have one."""
    if not layers[0].lasso_weights:
        return core
    expert_LP = torch.stack([layer.lasso_weights[0] for layer in layers])
    return weigh_slices(layers, core) * expert_LP.view(len(layers), 1, -1, 1, 1)


def weigh_slices(layers: Sequence[ExpertTensor], core: Tensor) -> Tensor:
    """Stacked matrices (L, …, R, H) under the lasso weights of their rows and columns, if the layers have them."""
    if not layers[0].lasso_weights:
        return core
    rows_LR = torch.stack([layer.lasso_weights[1] for layer in layers])
    columns_LR = torch.stack([layer.lasso_weights[-1] for layer in layers])
    ones, width = [1] * (core.ndim - 3), core.shape[-1]
    rows = rows_LR.view(len(layers), *ones, -1, 1)
    columns_LCH = columns_LR.unflatten(-1, (-1, width))
    columns_LRH = columns_LCH.repeat_interleave(width, dim=1)  # a row of block h meets the columns of block h
    return core * rows * columns_LRH.view(len(layers), *ones, -1, width)


def _mode_norms(layers: Sequence[ExpertTensor], modes: Sequence[Modes] | None, device: torch.device) -> Tensor:  # (L,)
    """‖U‖ ‖V‖ of every layer; the norms of factors that layers share are taken once."""
    norms: dict[int, tuple[Tensor, Tensor]] = {}
    for index, layer in enumerate(layers):
        if id(layer.owner) not in norms:
            u, v = layer.modes() if modes is None else modes[index]
            of_u = torch.linalg.vector_norm(u).to(device)
            norms[id(layer.owner)] = of_u, of_u if layer.tied else torch.linalg.vector_norm(v).to(device)
    inputs, outputs = (torch.stack(column) for column in zip(*(norms[id(layer.owner)] for layer in layers)))
    return ops.safe_product(inputs, outputs)


def _bound(layer: ExpertTensor, columns: int) -> float:
    """Norm at which a factor of that many columns acts."""
    return 1.0 if layer.normalize is True else columns**0.5
