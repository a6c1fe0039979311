"""Routes that no longer depend on data: what an export or a merge holds in place of a router.

At a fixed route the update of a layer is linear in its mixing matrix M, so one weight per expert says all, whether it
stands for one group or for the mean of many samples.

Shape legend: N routed units, K groups, T experts in a group (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from ..calibration import FeatureReader, as_found, device_of
from ..config import TuckAConfig
from ..model import dispatchers_of, layers_of
from ..recording import unrecorded
from ..routing import Route, Router

MEAN = "mean"

RouteLike = Union[int, str, Route]


class FixedRoute(NamedTuple):
    """The weight of every expert of one tower, whatever the data.

    `source` says where the weights come from: "given" (a `Route` with gates) and "constant" (a single expert whose gate
    is the same for all data) are exact for what they name. "samples" (the mean gates of the loader's units that chose
    the group), "centroids" (the gates at the group's own centroids) and "mean" (the mean route of the loader) stand for
    routes whose gates differ from sample to sample.
    """

    weights: Tensor  # (K, T)
    source: str
    group: Optional[int] = None  # None: more than one group has a weight
    units: Optional[int] = None  # how many of the loader's routed units it is the mean of


class Observed(NamedTuple):
    """A loader's batches, and the routes their units took by tower."""

    batches: list[Any]
    routes: dict[str, Route]  # fields (N, …) over the units of all batches
    units: list[int]  # routed units of every batch


def fixed_routes(
    model: nn.Module,
    name: str,
    route: RouteLike | Mapping[str, RouteLike],
    observed: Observed | None,
) -> dict[str, FixedRoute]:
    """One fixed route per tower from what a user gave.

    Raises
    ------
    ValueError
        If a tower has no route or is unknown, a group is outside 0…K−1, a `Route` has several units or gates of another
        shape, "mean" has no loader, or gates are to be read from a router that has not started.
    """
    routers = {tower: dispatcher.router(name) for tower, dispatcher in dispatchers_of(model, name).items()}
    if not isinstance(route, Mapping):
        if len(routers) > 1 and not isinstance(route, str):
            raise ValueError(f"the model has {len(routers)} towers: give a route for each of {list(routers)}")
        route = dict.fromkeys(routers, route)
    if set(route) != set(routers):
        raise ValueError(f"the towers of the model are {sorted(routers)}, but routes are given for {sorted(route)}")
    seen = {} if observed is None else observed.routes
    return {tower: _fixed(route[tower], router, seen.get(tower)) for tower, router in routers.items()}


def _fixed(route: RouteLike, router: Router, seen: Route | None) -> FixedRoute:
    config = router.config
    if isinstance(route, str):
        if route != MEAN:
            raise ValueError(f"route={route!r} is no route: give a group, a Route, or 'mean' with a loader")
        if seen is None:
            raise ValueError("route='mean' is the mean route of a loader's samples: give loader=batches")
        return mean_route(seen, config)
    if isinstance(route, Route):
        if tuple(route.group.shape) != (1,):
            raise ValueError(
                f"an export holds one route, but the Route has {route.group.numel()} units; pick one, for example "
                "route.map(lambda field: field[:1])"
            )
        group = int(route.group)
        if route.gates is not None:
            return _given(_checked_group(group, config.k), route.gates, config)
    elif isinstance(route, bool) or not isinstance(route, int):
        raise ValueError(f"route={route!r} is no route: give a group, a Route, or 'mean' with a loader")
    else:
        group = route
    return group_route(_checked_group(group, config.k), router, seen)


def _checked_group(group: int, k: int) -> int:
    if not 0 <= group < k:
        raise ValueError(f"groups run from 0 to k-1={k - 1}, but the route names {group}")
    return group


def _given(group: int, gates: Tensor, config: TuckAConfig) -> FixedRoute:
    if tuple(gates.shape) != (1, config.t):
        raise ValueError(
            f"gates have shape {tuple(gates.shape)}, but one unit of t={config.t} experts needs (1, {config.t})"
        )
    return FixedRoute(_in_group(group, gates[0], config.k), "given", group)


def _in_group(group: int, gates: Tensor, k: int) -> Tensor:  # (K, T)
    weights = torch.zeros(k, len(gates), dtype=gates.dtype, device=gates.device)
    weights[group] = gates.detach()
    return weights


def is_constant(config: TuckAConfig) -> bool:
    """Whether the route is the same for all data: one expert, whose gate is no sign of a logit as the paper's."""
    return config.k * config.t == 1 and config.affinity != "paper"


@torch.no_grad()
def group_route(group: int, router: Router, seen: Route | None) -> FixedRoute:
    """A group with gates that stand for its samples: their mean, or without samples those at its own centroids."""
    config = router.config
    if is_constant(config):
        source, gates = "constant", router(torch.zeros_like(router.centroids)).gates[0]
        return FixedRoute(_in_group(group, gates, config.k), source, group)
    if seen is not None and seen.gates is not None and bool((seen.group == group).any()):
        gates = seen.gates[seen.group == group]
        return FixedRoute(_in_group(group, gates.mean(0), config.k), "samples", group, len(gates))
    if not bool(router.initialised):
        raise ValueError(
            "the router has not started, so its centroids say nothing yet: train or calibrate the adapter first, or "
            "give a Route with gates"
        )
    gates = centroid_gates(router, group)
    return FixedRoute(_in_group(group, gates, config.k), "centroids", group, None if seen is None else 0)


def centroid_gates(router: Router, group: int) -> Tensor:  # (T,)
    """Gates of a feature that lies at the mean of the group's T centroids."""
    config = router.config
    placed_1Q = router.centroids[group * config.t : (group + 1) * config.t].mean(0, keepdim=True)
    feature_1F = router.placement.inverse(placed_1Q)
    gates = router(feature_1F, torch.tensor([group], device=feature_1F.device)).gates
    assert gates is not None
    return gates[0]


def mean_route(seen: Route, config: TuckAConfig) -> FixedRoute:
    """The mean over units of their gates, each in the group it chose: E[g_j 1(i = i₀)]."""
    assert seen.gates is not None
    weights = seen.gates.new_zeros(config.k, config.t)
    weights.index_add_(0, seen.group, seen.gates.detach())
    units = len(seen.group)
    return FixedRoute(weights / units, MEAN, units=units)


# --- the routes of a loader ----------------------------------------------------------------------------------------


def require_active(model: nn.Module, name: str) -> None:
    """Raise `ValueError` if an adapter is not the only active one: outputs and trained heads would be another's."""
    layers = layers_of(model)
    active = sorted({one for layer in layers for one in layer.active_adapters if not layer.disable_adapters})
    if active != [name]:
        raise ValueError(
            f"adapter {name!r} must be the only active one, but active are {active}; call set_adapter first"
        )


@contextmanager
def quietly(model: nn.Module, name: str) -> Iterator[None]:
    """Run forwards of that adapter which leave no trace: evaluation mode, no gradient, counted by nobody."""
    require_active(model, name)
    with ExitStack() as stack:
        stack.enter_context(unrecorded(dispatchers_of(model).values()))
        stack.enter_context(as_found(model))
        stack.enter_context(torch.no_grad())
        yield


def observe(model: nn.Module, name: str, loader: Iterable[Any], samples: int) -> Observed:
    """Read batches until they hold so many samples, and the routes of all their units.

    Raises
    ------
    ValueError
        If there is no batch, a tower is never reached, or the router has not started.
    """
    dispatchers = dispatchers_of(model, name)
    routers = {tower: dispatcher.router(name) for tower, dispatcher in dispatchers.items()}
    if not all(bool(router.initialised) for router in routers.values()):
        raise ValueError(f"the router of adapter {name!r} has not started, so a loader has no routes yet")
    per_sample = all(router.per_sample for router in routers.values())
    reader, batches, units, read = FeatureReader(layers_of(model), name, per_sample), [], [], 0
    with quietly(model, name):
        for batch in loader:
            units.append(reader.read(model, batch, device_of(model)))
            batches.append(batch)
            read += samples_in(batch)
            if read >= samples:
                break
        features = {tower: torch.cat(parts) for tower, parts in reader.features.items() if parts}
        if not batches:
            raise ValueError("the loader yields no batch")
        if set(features) != set(routers):
            raise ValueError(f"no batch of the loader reaches the towers {sorted(set(routers) - set(features))}")
        return Observed(batches, {tower: routers[tower](feature) for tower, feature in features.items()}, units)


def samples_in(batch: Any) -> int:
    """Leading size of a batch's first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    sizes = [len(value) for value in values if isinstance(value, Tensor) and value.ndim]
    return sizes[0] if sizes else 1
