"""Who mixes when: all layers of a forward at once, and while the route of a prompt is kept, not again.

Shape legend: N routed units, R rank (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
from torch import Tensor

from .mixing import kind_of, mix_layers
from .processes import is_lent
from .routing import Route
from .scope import Current, Scope

if TYPE_CHECKING:
    from .layer import TuckALayer

Mixes = dict[str, Tensor]
"""α M, (N, R, R), of layers by name."""


class Kept(NamedTuple):
    """The mixes of a route, and the state of the parameters they were made of."""

    adapter_name: str
    route: Route
    state: list[tuple[int, int]]
    mixes: Mixes


class Mixer:
    """Mixes the experts of the layers that share a dispatcher."""

    def __init__(self) -> None:
        self.layers: dict[str, TuckALayer] = {}
        self.apart = False  # a layer's parameters are at hand in its own block alone

    def mix(self, adapter_name: str, layer: TuckALayer, route: Route, current: Current) -> Tensor:  # (N, R, R)
        """α M of a layer at the route of the forward under way."""
        scope: Any = current.scope
        key = (adapter_name, torch.is_grad_enabled())
        if not scope.by_layer and key not in scope.mixes:
            self._mix_all(key, route, scope, current)
        if scope.by_layer:
            return mix_layer(layer, adapter_name, route)
        return scope.mixes[key][layer.tucka_input_of.get(adapter_name, layer).name]

    def _mix_all(self, key: tuple[str, bool], route: Route, scope: Scope, current: Current) -> None:
        adapter_name, under_gradient = key
        layers = [
            layer
            for layer in self.layers.values()
            if adapter_name in layer.tucka_experts and layer.tucka_routed[adapter_name]
        ]
        # Once seen, for good: blocks that an evaluation has left whole reduce their gradients one by one in backward.
        experts = [layer.experts_of(adapter_name) for layer in layers]
        self.apart = self.apart or any(
            is_lent(own.core, ndim=4) or is_lent(own.owner.input_factor, ndim=2) for own in experts
        )
        scope.by_layer = self.apart
        if scope.by_layer:
            return
        fresh = adapter_name in scope.features  # a route taken in this forward, which none before has used
        if under_gradient or fresh or torch.compiler.is_compiling():
            scope.mixes[key] = mix_together(layers, adapter_name, route)
            return
        state = _state(layer.experts_of(adapter_name) for layer in layers)
        kept: Optional[Kept] = current.kept
        if kept is None or kept.adapter_name != adapter_name or kept.route is not route or kept.state != state:
            kept = current.kept = Kept(adapter_name, route, state, mix_together(layers, adapter_name, route))
        scope.mixes[key] = kept.mixes


def mix_together(layers: Iterable[TuckALayer], adapter_name: str, route: Route) -> Mixes:
    """α M of every layer, those of one kind at once."""
    families: dict[tuple, list[TuckALayer]] = {}
    for layer in layers:
        kind = (*kind_of(layer.experts_of(adapter_name)), layer.tucka_alpha[adapter_name])
        families.setdefault(kind, []).append(layer)
    found: Mixes = {}
    for family in families.values():
        experts = [layer.experts_of(adapter_name) for layer in family]
        device = experts[0].core.device
        group, gates = route.to(device)[:2]
        with torch.autocast(device_type=device.type, enabled=False):  # R×R work, in the parameters' precision
            mixes = mix_layers(experts, group, gates) * family[0].tucka_alpha[adapter_name]
        found.update(zip((layer.name for layer in family), mixes.unbind(0)))
    return found


def mix_layer(layer: TuckALayer, adapter_name: str, route: Route | None) -> Tensor:  # (N, R, R)
    """α M of one layer by itself; with no route, of its shared slice."""
    experts = layer.experts_of(adapter_name)
    modes = layer.modes(adapter_name)
    group, gates = (None, None) if route is None else route.to(experts.core.device)[:2]
    with torch.autocast(device_type=experts.core.device.type, enabled=False):
        return experts.mix(group, gates, modes) * layer.tucka_alpha[adapter_name]


def _state(experts: Iterable[Any]) -> list[tuple[int, int]]:
    """Where the values of all parameters lie and how often they were written to."""
    found: dict[int, Tensor] = {}
    for tensor in experts:
        for held in (tensor, tensor.owner):
            found |= {id(value): value for value in (*held.parameters(), *held.buffers())}
    return [(value.data_ptr(), 0 if value.is_inference() else value._version) for value in found.values()]
