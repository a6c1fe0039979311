"""The update of a layer at a fixed route, as the two factors of an ordinary LoRA.

With row vectors the update is x U M Vᵀ: added to the output (additive form), or to the input that W then sees
(multiplicative form, Δy = x U M Uᵀ Wᵀ). Both are x Aᵀ Bᵀ with A = Uᵀ and B = α V Mᵀ or B = α W U Mᵀ, of rank R. A slice
on the axes adds x E Wᵀ, whose rank is that of W.

Shape legend: K groups, T experts in a group, D input features, O output features, R rank (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import tensorly as tl
import torch
from torch import Tensor, nn

from ..layer import TuckALayer
from ..model import layers_of
from ..ops import axes_matrix
from ..tensors import ExpertTensor
from ..towers import SHARED_INPUT_METHODS
from .routes import FixedRoute
from .weights import at_least_single, through_weight


class LowRank(NamedTuple):
    """An update y + x Aᵀ Bᵀ."""

    a: Tensor  # (R, D)
    b: Tensor  # (O, R)

    def __call__(
        self,
        x: Tensor,  # (..., D)
    ) -> Tensor:  # (..., O)
        """What the update adds to a layer's output for that input."""
        return (x.to(self.a.dtype) @ self.a.mT) @ self.b.mT


def low_rank_updates(
    model: nn.Module, name: str, routes: Mapping[str, FixedRoute], rank: int | None = None
) -> dict[str, LowRank]:
    """The update of every layer of an adapter at one fixed route per tower, by layer name; cut to a rank, if given.

    Raises
    ------
    ValueError
        If an update is not finite.
    """
    found = {}
    for layer in layers_of(model):
        if name in layer.tucka_form:
            update = low_rank_update(
                layer, name, routes[layer.dispatcher.name].weights if layer.tucka_routed[name] else None
            )
            if not bool(update.a.isfinite().all() & update.b.isfinite().all()):
                raise ValueError(f"the update of layer {layer.name!r} is not finite")
            found[layer.name] = update if rank is None else cut(update, rank)
    return found


@torch.no_grad()
def cut(update: LowRank, rank: int) -> LowRank:
    """The nearest update of a rank, by a truncated SVD (tensorly); one of no higher rank is as it was."""
    if len(update.a) <= rank:
        return update
    with tl.backend_context("pytorch", local_threadsafe=True):
        u_OR, s_R, v_RD = tl.tenalg.svd_interface(update.b @ update.a, n_eigenvecs=rank, method="truncated_svd")
    return LowRank(v_RD.contiguous(), (u_OR * s_R).contiguous())


@torch.no_grad()
def low_rank_update(
    layer: TuckALayer,
    name: str,
    weights: Tensor | None,  # (K, T); None for a layer before the router, whose one expert is always active
) -> LowRank:
    """The update of one layer.

    Raises
    ------
    ValueError
        If it takes the weight of the layer, and that is offloaded.
    """
    experts = layer.experts_of(name)
    multiplicative, on_axes = layer.tucka_form[name] == "multiplicative", experts.axis_core is not None
    if (multiplicative or on_axes) and any(held.is_meta for held in layer.get_base_layer().parameters()):
        raise ValueError(
            f"layer {layer.name!r} cannot be exported or merged: its weight is offloaded; load it onto a device"
        )
    weights = experts.core.new_ones(1, 1) if weights is None else weights.to(experts.core)
    mix_RR = at_least_single(mixed(experts, weights)) * layer.tucka_alpha[name]
    input_mode, output_mode = (mode.detach().to(mix_RR) for mode in (experts.input_mode, experts.output_mode))
    out_RO = mix_RR @ output_mode.mT
    if multiplicative:
        out_RO = through_weight(layer.get_base_layer(), out_RO)
    blocks = layer.axis_blocks(name, mix_RR)
    if blocks is not None:
        on_axes_DO = through_weight(layer.get_base_layer(), axes_matrix(blocks))
        return whole_update(on_axes_DO.to(mix_RR) + input_mode @ out_RO.to(mix_RR))
    return LowRank(input_mode.mT.contiguous().clone(), out_RO.mT.to(mix_RR).contiguous())


def whole_update(
    matrix: Tensor,  # (D, O)
) -> LowRank:
    """An update y + x Δ as a `LowRank` of the rank of the narrower side: one of its factors is the identity."""
    features, outputs = matrix.shape
    if features <= outputs:
        return LowRank(torch.eye(features, dtype=matrix.dtype, device=matrix.device), matrix.mT.contiguous())
    return LowRank(matrix.mT.contiguous(), torch.eye(outputs, dtype=matrix.dtype, device=matrix.device))


def mixed(
    experts: ExpertTensor,
    weights: Tensor,  # (K, T)
) -> Tensor:  # (R, R)
    """M = M_shared + Σ_ij w[i,j] Σ_p C[j,p] 𝒢[i,p], with every norm folded in."""
    groups = weights.any(-1).nonzero().squeeze(-1)
    always = experts.mix(None, None)[0]
    # Each group's mix holds the shared slice once; it belongs in the sum once.
    return experts.mix(groups, weights[groups]).sum(0) - (len(groups) - 1) * always


@contextmanager
def fixed(model: nn.Module, updates: Mapping[str, LowRank]) -> Iterator[None]:
    """Let every adapted layer act as its base layer with a LoRA beside it."""
    with ExitStack() as stack:
        for layer in layers_of(model):
            stack.enter_context(layer.bare())
            if layer.name in updates:
                handle = layer.register_forward_hook(partial(_add, updates[layer.name]))
                stack.callback(handle.remove)
        yield


def _add(update: LowRank, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output + update(args[0]).to(output)


def layers_on_shared_input(model: nn.Module, name: str) -> list[str]:
    """Routed layers that are also applied to relative positions (DeBERTa), which belong to no sample.

    With sample routing only the shared slice acts there; a LoRA acts there like anywhere else.
    """
    found = []
    for module in model.modules():
        for method in SHARED_INPUT_METHODS.get(type(module).__name__, ()):
            function = vars(type(module)).get(method)
            # The attributes that the method's code names: of the projections, those it applies.
            named = () if function is None else function.__code__.co_names
            for child in (child for key, child in module.named_children() if key in named):
                if isinstance(child, TuckALayer) and child.tucka_routed.get(name):
                    found.append(child)
    return [layer.name for layer in found if layer.dispatcher.router(name).per_sample]
