"""Families: layers that share their D-mode factors, and so one rank; what they cost, and how ranks are written down.

Shape legend: K groups, T experts in a group, D and O the D-modes, P and R ranks (see `tucka.ops`).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import nn

from ..layer import TuckALayer
from ..model import layers_of, single_adapter_name
from ..processes import is_distributed
from ..tensors import ExpertTensor


class Family(NamedTuple):
    """Layers of one adapter that share their D-mode factors; most often a layer on its own."""

    layers: tuple[TuckALayer, ...]  # the owner of the factors first
    adapter_name: str

    @property
    def name(self) -> str:
        """The name of the layer that owns the factors."""
        return self.layers[0].name

    @property
    def experts(self) -> list[ExpertTensor]:
        """The experts of every layer."""
        held: Any = [layer.tucka_experts[self.adapter_name] for layer in self.layers]
        return held

    @property
    def rank(self) -> int:
        """R."""
        return self.experts[0].core.shape[-2]

    @property
    def tied(self) -> bool:
        """Whether both D-modes are one."""
        return self.experts[0].tied

    @property
    def shared_ranks(self) -> list[int]:
        """P of every layer; 1 for one that runs before the router."""
        return [experts.core.shape[1] for experts in self.experts]

    @property
    def widest(self) -> int:
        """The largest rank that the widths of the layers allow."""
        experts = self.experts[0]
        return min(len(experts.input_mode), len(experts.output_mode))

    def routed(self, index: int) -> bool:
        """Whether a layer has the groups of the configuration: one before the router has a single expert."""
        return self.layers[index].tucka_routed[self.adapter_name]

    @property
    def width(self) -> int:
        """H: entries in a row of a core."""
        return self.experts[0].core.shape[-1]

    @property
    def columns(self) -> int | None:
        """Columns of every factor that train where others are held; None: all train, or none."""
        owner = self.experts[0].owner
        return None if owner.held_input is None else owner.trained_columns

    def parameters(self, rank: int, p: int | None = None, width: int | None = None, columns: int | None = None) -> int:
        """Trainable parameters at rank R and, in routed layers, shared rank P: factors once, the rest of every layer.

        D·R (tied) or (D + O)·R (of columns that are not held), and for each layer (K·P + 1 with a shared slice)·R·H,
        T·P, A·D with a slice on the axes, and the weights of a tensor lasso. H is R, and as many columns train as do
        now, unless given.
        """
        first = self.experts[0]
        widths = len(first.input_mode) + (0 if self.tied else len(first.output_mode))
        trained = min(rank, columns or self.columns or rank) if isinstance(first.input_factor, nn.Parameter) else 0
        total = widths * trained
        for index, experts in enumerate(self.experts):
            groups, inner, per_group = len(experts.core), experts.core.shape[1], len(experts.expert_factor)
            if p is not None and self.routed(index):
                inner = p
            slices = groups * inner + (0 if experts.shared_core is None else 1)
            total += slices * rank * (width or rank) + per_group * inner
            total += 0 if experts.axis_core is None else experts.axis_core.numel()
            if experts.lasso_weights:
                total += inner + (len(experts.lasso_weights) - 1) * rank
        return total


def families_of(model: nn.Module, adapter_name: str | None = None) -> list[Family]:
    """The families of an adapter, in the order of the model.

    Raises
    ------
    ValueError
        If the model has no such adapter.
    """
    name = single_adapter_name(model, adapter_name)
    found: dict[int, list[TuckALayer]] = {}
    for layer in layers_of(model):
        if name in layer.tucka_experts:
            experts: Any = layer.tucka_experts[name]
            owner = experts._factors_of[0] or experts
            found.setdefault(id(owner), []).append(layer)
    return [Family(tuple(layers), name) for layers in found.values()]


def router_parameters(model: nn.Module, adapter_name: str) -> int:
    """K·T·F for every router of an adapter."""
    routers: list[Any] = [layer.tucka_router for layer in layers_of(model)]
    return sum(held[adapter_name].centroids.numel() for held in routers if adapter_name in held)


def adapter_parameters(model: nn.Module, adapter_name: str | None = None) -> int:
    """Trainable parameters of an adapter: experts and routers, without heads and biases trained beside it."""
    families = families_of(model, adapter_name)
    experts = sum(family.parameters(family.rank, width=family.width) for family in families)
    return experts + router_parameters(model, families[0].adapter_name)


def pattern_for(layer_name: str) -> str:
    """A key of `rank_pattern` that matches that layer alone, whatever characters its name has.

    PEFT matches a key to the end of a name, after a dot; the anchor keeps a name from matching longer ones it ends.
    """
    return f"^{re.escape(layer_name)}"


def first_process(value: Any) -> Any:
    """What the first process of a distributed run found: each has seen other batches, and all must do the same."""
    if not is_distributed():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def require_reloadable(families: list[Family], ranks: list[int], share_factors: bool) -> None:
    """Refuse ranks under which layers that do not share factors would share them when the adapter is loaded.

    Raises
    ------
    ValueError
        If two families of layers of one name and width get the same rank.
    """
    seen: dict[tuple, str] = {}
    for family, rank in zip(families, ranks) if share_factors else ():
        layer = family.layers[0]
        kind = (layer.name.rpartition(".")[2], layer.in_features, layer.out_features, rank)
        if kind in seen:
            raise ValueError(
                f"layers {seen[kind]!r} and {layer.name!r} have factors of their own because their ranks differ; with "
                f"rank {rank} for both, share_factors=True would make them share when the adapter is loaded. Give them "
                "different ranks (ranks=...)"
            )
        seen[kind] = layer.name
