"""Routes in the user's hands: record what the router decided, or decide in its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Union

import torch
from torch import Tensor, nn

from .dispatch import Dispatcher
from .model import dispatchers_of, layers_of, single_adapter_name
from .routing import Route
from .scope import replaced

Pinned = Union[Route, Tensor, Sequence[int]]


@contextmanager
def record_routes(model: nn.Module, adapter_name: str | None = None) -> Iterator[Any]:
    """Record the route of every forward of the base model.

    Parameters
    ----------
    model : PeftModel
        The adapted model.
    adapter_name : str, optional
        Whose routes; default: the active adapter's.

    Yields
    ------
    list of Route, or dict of such lists
        One `Route` per forward; for a model with several towers, such a list per tower, by tower name. Routes taken
        under gradient keep their graph, so a loss on `scores` can be added; `Route.detach` drops it.

    Raises
    ------
    ValueError
        If the model has no such adapter.
    """
    name = single_adapter_name(model, adapter_name)
    dispatchers = dispatchers_of(model, name)
    recordings: dict[str, list[Route]] = {tower: [] for tower in dispatchers}
    with ExitStack() as stack:
        for tower, dispatcher in dispatchers.items():
            stack.enter_context(dispatcher.recording(name, recordings[tower]))
        yield next(iter(recordings.values())) if len(recordings) == 1 else recordings


@contextmanager
def pin_route(model: nn.Module, route: Pinned | Mapping[str, Pinned]) -> Iterator[None]:
    """Use a given route instead of the router's.

    Parameters
    ----------
    model : PeftModel
        The adapted model.
    route : Route, or integers, or a dict of either by tower name
        A whole `Route` (one that `record_routes` recorded gives identical outputs), or only the group of every
        sample, whose gates the router then computes: one id per sample serves a batch of mixed tasks.

    Raises
    ------
    ValueError
        If a group lies outside 0…K−1, a shape does not fit, a tower is unknown, or (in the forward) the units of the
        route cannot be spread over the samples.
    """
    dispatchers = dispatchers_of(model)
    if not dispatchers:
        raise ValueError("the model has no Tucker experts; wrap it with tucka.apply first")
    if not isinstance(route, Mapping):
        if len(dispatchers) > 1:
            raise ValueError(f"the model has {len(dispatchers)} towers: give a route for each of {list(dispatchers)}")
        route = dict.fromkeys(dispatchers, route)
    unknown = [name for name in route if name not in dispatchers]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no tower of the model; its towers are {list(dispatchers)}")
    active = {name for layer in layers_of(model) for name in layer.active_adapters}
    pinned = {name: _checked(value, dispatchers[name], active) for name, value in route.items()}
    with ExitStack() as stack:
        for name, value in pinned.items():
            stack.enter_context(dispatchers[name].pinning(value))
        yield


def _checked(route: Pinned, dispatcher: Dispatcher, active: set[str]) -> Route:
    """A detached `Route` that fits every active adapter of the dispatcher."""
    whole = route if isinstance(route, Route) else Route(torch.as_tensor(route))
    if whole.group.ndim != 1 or whole.group.is_floating_point():
        raise ValueError(f"group holds one integer per routed unit, but has shape {tuple(whole.group.shape)}")
    for router in map(dispatcher.router, active.intersection(dispatcher.router_owners)):
        lowest, highest = (int(whole.group.min()), int(whole.group.max())) if whole.group.numel() else (0, 0)
        if lowest < 0 or highest >= router.config.k:
            raise ValueError(f"groups run from 0 to k-1={router.config.k - 1}, but the route names {lowest}…{highest}")
        if whole.gates is not None and whole.gates.shape != (whole.group.shape[0], router.config.t):
            raise ValueError(
                f"gates have shape {tuple(whole.gates.shape)}, but {whole.group.shape[0]} units of t="
                f"{router.config.t} experts need {(whole.group.shape[0], router.config.t)}"
            )
        whole = whole.to(router.centroids.device)
    return whole._replace(group=whole.group.long()).detach()


@contextmanager
def unrecorded(dispatchers: Iterable[Dispatcher]) -> Iterator[None]:
    """Run forwards that are nobody's who records or pins the routes of the model's own."""
    with ExitStack() as stack:
        for dispatcher in dispatchers:
            stack.enter_context(replaced(dispatcher.current, recordings=(), pinned=None, memory=None))
        yield
