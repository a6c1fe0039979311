"""What an adapter will change in a model, worked out and checked before anything is touched."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple, Optional

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from .config import TuckAConfig
from .layer import TuckALayer, linear_features
from .patterns import rank_lookup
from .towers import Tower, find_towers, tower_of

INPUT_FAMILIES = (
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
"""Names under which the layers of one parent module read one tensor."""


class LayerPlan(NamedTuple):
    """One layer to adapt."""

    rank: int
    tower: Tower
    routes: bool  # holds the router of its tower
    router_sources: Optional[tuple[str, ...]]  # layers that may feed it; None: whichever runs first
    factors_of: Optional[str]  # layer whose D-mode factors it shares
    routed: bool  # False: it runs before the router and carries one always-active expert
    input_of: Optional[str]  # layer whose adapted input it takes, having no experts of its own


def plan_adapter(
    tuner: BaseTuner, model: nn.Module, config: TuckAConfig, names: set[str] | None
) -> dict[str, LayerPlan]:
    """Plan an adapter: {layer name: LayerPlan}, in the order of the model's modules.

    Parameters
    ----------
    tuner : BaseTuner
        Decides by PEFT's rules which modules `config` targets.
    model : Module
        The model to adapt, whether or not it carries other adapters.
    config : TuckAConfig
        The adapter's configuration, with its targets resolved.
    names : set of str, optional
        Names of the layers to adapt where a state dict, not the configuration, says it.

    Raises
    ------
    ValueError
        If a target is no linear layer, a rank exceeds a layer's width, `router_module` names no adapted layer, or
        `router_depth` no block that holds one.
    """
    targets = _targets(tuner, model, config, names)
    rank_of = rank_lookup(config)
    widths = {name: _checked_features(name, module) for name, module in targets.items()}
    ranks = {name: _checked_rank(name, widths[name], rank_of(name), config) for name in targets}
    towers = find_towers(model)
    layers_of: dict[Tower, list[str]] = {}
    for name in targets:
        layers_of.setdefault(tower_of(name, towers), []).append(name)
    routing = _router_places(layers_of, config)
    borrowers = _borrowers(targets, widths, ranks) if config.share_inputs else {}
    owners: dict[tuple, str] = {}
    plans = {}
    for name in targets:
        kind = (name.rpartition(".")[2], *widths[name], ranks[name])
        owner = owners.setdefault(kind, name) if config.share_factors and name not in borrowers else name
        tower = tower_of(name, towers)
        owner_name, sources, unrouted = routing[tower]
        plans[name] = LayerPlan(
            rank=ranks[name],
            tower=tower,
            routes=name == owner_name,
            router_sources=sources,
            factors_of=None if owner == name else owner,
            routed=name not in unrouted,
            input_of=borrowers.get(name),
        )
    return plans


def _targets(tuner: BaseTuner, model: nn.Module, config: TuckAConfig, names: set[str] | None) -> dict[str, nn.Module]:
    every = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    _maybe_include_all_linear_layers(config, model)  # writes the names it finds into the configuration
    if every:  # layers that another adapter has wrapped are no plain linear layers any more
        adapted = {name for name, module in model.named_modules() if isinstance(module, TuckALayer)}
        config.target_modules = {*(config.target_modules or ()), *adapted}  # type: ignore[assignment]
    targets: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
        matched = name in names if names is not None else tuner._check_target_module_exists(config, name)
        if matched:
            targets[name] = module
    return targets


def _checked_features(name: str, module: nn.Module) -> tuple[int, int]:
    base = module.get_base_layer() if isinstance(module, TuckALayer) else module
    features = linear_features(base)
    if features is None:
        raise ValueError(
            f"target module {name!r} is a {type(base).__name__}; supported are torch.nn.Linear, transformers' Conv1D "
            "and quantised linear layers that PEFT wraps"
        )
    return features


def _checked_rank(name: str, features: tuple[int, int], rank: int, config: TuckAConfig) -> int:
    if rank > features[0]:
        raise ValueError(f"rank r={rank} exceeds in_features={features[0]} of layer {name!r}")
    if config.form == "additive" and rank > features[1]:
        raise ValueError(f"rank r={rank} exceeds out_features={features[1]} of layer {name!r}")
    return rank


def _borrowers(targets: Iterable[str], widths: dict[str, tuple[int, int]], ranks: dict[str, int]) -> dict[str, str]:
    """Layers whose input another layer adapts, and that layer: the first of its parent to read the tensor."""
    first: dict[tuple, str] = {}
    borrowers = {}
    for name in targets:
        parent, _, leaf = name.rpartition(".")
        for family in INPUT_FAMILIES:
            if leaf in family:
                owner = first.setdefault((parent, family, widths[name][0], ranks[name]), name)
                borrowers.update({name: owner} if owner != name else {})
    return borrowers


class RouterPlace(NamedTuple):
    """Where the router of a tower is held, which layers may feed it (None: whichever runs first), which run before."""

    owner: str
    sources: Optional[tuple[str, ...]]
    unrouted: frozenset[str] = frozenset()


def _router_places(layers_of: dict[Tower, list[str]], config: TuckAConfig) -> dict[Tower, RouterPlace]:
    places = {}
    for tower, layers in layers_of.items():
        chosen = _named(layers, config.router_module)
        in_encoder = [name for name in layers if tower.encoder and name.startswith(f"{tower.encoder}.")]
        if chosen:
            places[tower] = RouterPlace(chosen, (chosen,))
        elif config.router_depth and _blocks(layers):
            places[tower] = place_at_depth(config.router_depth, in_encoder or layers)
        else:
            places[tower] = RouterPlace((in_encoder or layers)[0], tuple(in_encoder) or None)
    adapted = [name for layers in layers_of.values() for name in layers]
    if config.router_module and not _named(adapted, config.router_module):
        raise ValueError(
            f"router_module={config.router_module!r} names none of the {len(adapted)} adapted layers: "
            f"{', '.join(adapted[:5])}, …"
        )
    if config.router_depth and not _blocks(adapted):
        raise ValueError(f"router_depth={config.router_depth} counts blocks, but no adapted layer lies in one")
    return places


def _named(layers: list[str], wanted: str | None) -> str | None:
    """The layer of that name, or else the only one whose name ends so."""
    chosen = [name for name in layers if wanted and (name == wanted or name.endswith(f".{wanted}"))]
    exact = [name for name in chosen if name == wanted] or chosen
    if len(exact) > 1:
        raise ValueError(f"router_module={wanted!r} matches {len(exact)} adapted layers, {exact[0]!r} among them")
    return exact[0] if exact else None


def _blocks(layers: list[str]) -> dict[str, int]:
    """Index of the block that a layer lies in: the first number in its name."""
    found = {name: re.search(r"(?:^|\.)(\d+)\.", name) for name in layers}
    return {name: int(match[1]) for name, match in found.items() if match}


def place_at_depth(depth: int, layers: list[str]) -> RouterPlace:
    """The router's place in the block of that index, given the adapted layers of a tower in order.

    Raises
    ------
    ValueError
        If no adapted layer lies in that block.
    """
    blocks = _blocks(layers)
    sources = [name for name, block in blocks.items() if block == depth]
    if not sources:
        raise ValueError(
            f"router_depth={depth}, but the adapted layers {layers[0]!r} to {layers[-1]!r} lie in blocks "
            f"{min(blocks.values())} to {max(blocks.values())}"
        )
    outside_before = layers[: layers.index(next(iter(blocks)))]  # such as a projection of the embeddings
    before = [name for name, block in blocks.items() if block < depth]
    return RouterPlace(sources[0], tuple(sources), frozenset([*outside_before, *before]))
