"""One route per forward of the base model: who opens it, who takes it, who reads it.

A `Dispatcher` serves one router (one tower). Hooks on the base model, and on every pretrained model inside it, open a
`Scope` for the duration of a forward; the first adapted layer to run fills it and later layers read it. Nothing here is
global: the layers hold their dispatcher, and `copy.deepcopy` of a model copies it along.

Shape legend: N routed units, B samples, S positions, D features (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .inputs import Inputs, read_inputs
from .mixer import Mixer
from .processes import is_sharded, keeps_writes, whole
from .routing import Route, Router
from .scope import Current, Scope, Threads, replaced
from .units import as_units, check_rows


class Dispatcher:
    """Opens a scope for every forward of one tower and hands its route to the layers.

    Parameters
    ----------
    name : str
        The tower's name; empty for a model with a single router.
    encoder : Module, optional
        The encoder of an encoder–decoder model, which takes the route for both.
    """

    def __init__(self, name: str, encoder: nn.Module | None = None) -> None:
        self.name = name
        self._encoder = (encoder,)
        self._threads = Threads()
        self.router_owners: dict[str, Any] = {}  # adapter name -> the TuckALayer that holds its router
        self.mixer = Mixer()
        self.attachment: Any = None  # the hooks on the model, to be removed with the adapters

    @property
    def current(self) -> Current:
        """What holds in this thread."""
        return self._threads.here

    def router(self, adapter_name: str) -> Router:
        """The router of an adapter."""
        return self.router_owners[adapter_name].tucka_router[adapter_name]

    # --- opening and closing -------------------------------------------------------------------------------------

    def open(self, names: tuple[str, ...], main_input: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook: open a scope, with the routes that this forward continues."""
        inputs = read_inputs(module, names, main_input, args, kwargs)
        current = self.current
        if current.prompt is not None and (inputs.positions or 0) > current.prompt:
            inputs = inputs._replace(prompt=current.prompt)
        if current.scope is not None and current.scope.holds(module):
            current.scope = None  # left open by a forward that was interrupted: no model runs inside itself
        if current.scope is not None:
            # A decoder without a mask of its own must not take its encoder's.
            current.scope = current.scope.nested(module, inputs, inherit_mask=self._encoder[0] is None)
            return
        trains = module.training and torch.is_grad_enabled()
        # A block's parameters are whole in its own forward, so whether they are sharded shows here only.
        sharded = any(is_sharded(self.router(name).centroids) for name in self.router_owners)
        scope = Scope(inputs, {}, trains=trains, pinned=current.pinned, module=module, sharded=sharded)
        # Groups that a user chose get the gates of the prompt, as groups that the router chose do.
        if current.pinned is None or (current.pinned.gates is None and current.memory):
            self._continue(scope, module)
        current.scope = scope

    def _continue(self, scope: Scope, module: nn.Module) -> None:
        """Keep the prompt's routes while decoding, and the encoder's in its decoder; an encoder always routes anew."""
        (encoder,) = self._encoder
        if module is encoder or (encoder is not None and scope.inputs.encoder_outputs is None):
            return
        known = self.current.memory or {}
        if not known and scope.inputs.cache is not None:
            known = getattr(scope.inputs.cache, "tucka_routes", {}).get(self.name, {})
            length = scope.inputs.cache.get_seq_length() if known else 0
            if isinstance(length, Tensor):
                scope.kept, scope.warm, known = _expanded(known, scope), length.view(()) > 0, {}
            elif length == 0:
                known = {}
        if not known and scope.inputs.encoder_outputs is not None:
            known = getattr(scope.inputs.encoder_outputs, "tucka_routes", {}).get(self.name, {})
            scope.needs_encoder = not known
        scope.routes.update(_expanded(known, scope))

    def close(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook: close the scope; its routes travel on with the cache or the encoder outputs."""
        scope = self.current.scope
        if scope is None:
            return
        self.current.scope = scope.parent
        if scope.parent is not None or not scope.routes or output is None:  # None: the forward raised
            return
        taken = {name: route.detach() for name, route in scope.routes.items()}
        if self.current.memory is not None:
            self.current.memory = taken
        if isinstance(output, ModelOutput):
            carriers = [output.get("past_key_values"), output if module is self._encoder[0] else None]
            for carrier in carriers:
                if carrier is not None and not isinstance(carrier, tuple):
                    carrier.tucka_routes = {**getattr(carrier, "tucka_routes", {}), self.name: taken}
        for adapter_name, routes in self.current.recordings:
            if adapter_name in scope.routes:
                routes.append(scope.routes[adapter_name])
        if scope.trains:
            for adapter_name, route in scope.routes.items():
                self.router(adapter_name).balance(route.group)

    # --- taking and reading --------------------------------------------------------------------------------------

    def route(self, adapter_name: str, layer_name: str, x: Tensor) -> Route | None:
        """The route of this forward for a layer; the first layer to ask takes it. None: an input all samples share.

        Raises
        ------
        RuntimeError
            If no forward of the base model is under way, or a layer that may not take the route asks first.
        ValueError
            If the layer's leading size cannot be tied to the samples.
        """
        scope = self.current.scope
        if scope is None:
            raise RuntimeError(
                f"layer {layer_name!r} reads a route but no forward of its model is open. Call the model (or a "
                "pretrained model inside it); recompute checkpointed blocks through the model's own "
                "gradient_checkpointing_enable()"
            )
        router = self.router(adapter_name)
        if scope.shared_input and router.per_sample:
            return None
        route = scope.routes.get(adapter_name)
        if route is None:
            route = scope.routes[adapter_name] = self._take(router, adapter_name, layer_name, x, scope)
        elif _lost_gradient(route, router) and adapter_name in scope.features:
            route = scope.routes[adapter_name] = router(scope.features[adapter_name], _pinned_group(scope))
        if route.group.shape[0] != 1 or router.per_sample:
            check_rows(x, scope.inputs, layer_name)
        return route

    def _take(self, router: Router, adapter_name: str, layer_name: str, x: Tensor, scope: Scope) -> Route:
        if scope.pinned is not None and scope.pinned.gates is not None:
            return scope.pinned.expand(scope.inputs.samples or 1)
        if scope.needs_encoder:
            raise RuntimeError(
                f"layer {layer_name!r} needs the route its encoder took, but encoder_outputs carry none. Pass the "
                "outputs this model's encoder returned, or use tucka.pin_route"
            )
        if not router.may_feed(layer_name):
            raise RuntimeError(
                f"layer {layer_name!r} ran before any layer that may feed the router: {', '.join(router.sources or ())}"
            )
        if x.shape[-1] != router.width:
            raise ValueError(
                f"layer {layer_name!r} ran first and has {x.shape[-1]} input features, but the router was built for "
                f"{router.width}; set router_module to the layer that runs first"
            )
        feature = self.feature(router, layer_name, x, scope.inputs, per_sample=router.per_sample)
        if router.awaits_start and scope.trains:
            if scope.sharded or not keeps_writes(router.centroids):
                raise RuntimeError(
                    f"the router of adapter {adapter_name!r} would start from this batch, but FSDP and DeepSpeed drop "
                    "what a forward writes to parameters. Start it before the model is prepared: "
                    "tucka.apply(model, calibration=...), tucka.initialize, or init_router='kaiming'"
                )
            router.start(feature)
        scope.features[adapter_name] = _leaf_without_graph(feature)
        if feature.requires_grad and adapter_name in scope.recomputed:
            feature.register_hook(_adding_gradient_of(scope.recomputed[adapter_name]))
        route = router(feature, _pinned_group(scope))
        if scope.warm is not None and adapter_name in scope.kept:
            route = _where(scope.warm, scope.kept[adapter_name], route)
        return route

    def adapted_input(self, makers: list, x: Tensor) -> Tensor | None:
        """What those experts made of that very tensor, if they were the last to adapt one in this forward."""
        known = None if self.current.scope is None else self.current.scope.adapted
        return known[2] if known is not None and known[0] == makers and known[1] is x else None

    def lend_input(self, makers: list, x: Tensor, adapted: Tensor) -> None:
        """Keep an adapted input for the layers that read the same tensor; the next one takes its place."""
        if self.current.scope is not None:
            self.current.scope.adapted = (makers, x, adapted)

    def whole(self, parameter: Tensor) -> Tensor:
        """A parameter that may be another layer's; where processes hold parts of it, gathered once per forward.

        FSDP2 gathers a block's parameters while that block runs, but shared factors act in other blocks too.
        """
        if parameter.ndim != 2:
            raise RuntimeError("FSDP1 lends a factor to its own block alone: use FSDP2, or share_factors=False")
        if not is_sharded(parameter):
            return parameter
        known = {} if self.current.scope is None else self.current.scope.gathered
        found = known.get(parameter)
        if found is None or (parameter.requires_grad and torch.is_grad_enabled() and not found.requires_grad):
            found = known[parameter] = whole(parameter)
        return found

    @staticmethod
    def feature(router: Router, layer_name: str, x: Tensor, inputs: Inputs, *, per_sample: bool) -> Tensor:
        """Pool a layer's input, (..., D), into the routing features of its units, (N, F)."""
        pooled = dict(pool_padding=router.config.pool_padding, pool_answers=router.config.pool_answers)
        units, keep = as_units(x, inputs, layer_name, per_sample=per_sample, **pooled)
        if per_sample and not router.per_sample:  # samples of this process, looked at one by one
            return router.feature(units, keep, alone=True)
        return router.feature(units, keep)

    # --- contexts ------------------------------------------------------------------------------------------------

    @contextmanager
    def entered(self, scope: Scope | None) -> Iterator[None]:
        """Make a scope the current one, as a checkpointed block does when it is recomputed."""
        with replaced(self.current, scope=scope):
            yield

    @contextmanager
    def generating(self, whole_prompt: bool = True, prompt: int | None = None) -> Iterator[None]:
        """Keep the prompt's route over all forwards of one `generate`, cached or not.

        The first may read more than the `prompt`, so many positions: an assistant's drafts follow it, and do not count.

        Raises
        ------
        ValueError
            If the prompt is to be read in chunks, the first of which cannot stand for it, and no route is pinned.
        """
        if not whole_prompt and self.current.pinned is None:
            raise ValueError(
                "prefill_chunk_size reads a prompt in parts, but its route is taken from the whole; "
                "leave it out, or pin the route (tucka.pin_route)"
            )
        with replaced(self.current, memory={}, ready={}, prompt=prompt):
            yield

    @contextmanager
    def pinning(self, route: Route) -> Iterator[None]:
        """Use that route in every forward opened meanwhile."""
        with replaced(self.current, pinned=route):
            yield

    @contextmanager
    def recording(self, adapter_name: str, routes: list[Route]) -> Iterator[None]:
        """Append an adapter's route of every forward to a list."""
        with replaced(self.current, recordings=(*self.current.recordings, (adapter_name, routes))):
            yield

    def call_with_shared_input(self, function, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the base model that applies layers to what all samples share (relative positions)."""
        scope = self.current.scope
        if scope is None:
            return function(*args, **kwargs)
        with replaced(scope, shared_input=True):
            return function(*args, **kwargs)


def _expanded(routes: dict[str, Route], scope: Scope) -> dict[str, Route]:
    samples = scope.inputs.samples
    return {name: route if samples is None else route.expand(samples) for name, route in routes.items()}


def _where(condition: Tensor, kept: Route, fresh: Route) -> Route:
    """One of two routes that a router took, chosen on the device."""
    pairs: Any = zip(kept, fresh)
    return Route(*(torch.where(condition, one, other) for one, other in pairs))


def _pinned_group(scope: Scope) -> Tensor | None:
    return None if scope.pinned is None else scope.pinned.expand(scope.inputs.samples or 1).group


def _leaf_without_graph(feature: Tensor) -> Tensor:
    """Outside of gradient mode (a reentrant checkpoint), a leaf that collects what later layers send back."""
    return feature if torch.is_grad_enabled() else feature.detach().requires_grad_()


def _adding_gradient_of(leaf: Tensor):
    """A hook that adds the gradient collected at that leaf."""
    return lambda gradient: gradient if leaf.grad is None else gradient + leaf.grad


def _lost_gradient(route: Route, router: Router) -> bool:
    """A route taken in a reentrant checkpoint has no graph; under gradient it is taken again from its feature."""
    if not torch.is_grad_enabled() or not router.centroids.requires_grad or route.gates is None:
        return False
    return not route.gates.requires_grad
