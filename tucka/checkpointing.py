"""Gradient checkpointing: a recomputed block sees the route of its own forward.

A checkpointed block runs twice, the second time inside backward, when its forward is long over and another may have
run since. transformers lets every block call an attribute, `_gradient_checkpointing_func`, to checkpoint itself; that
attribute is wrapped so that the block carries its scope with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .dispatch import Dispatcher
from .scope import Scope


class RouteKeepingCheckpoint:
    """A checkpoint function whose blocks keep their scope."""

    def __init__(self, dispatcher: Dispatcher, function: Callable) -> None:
        self.dispatcher = dispatcher
        self.function = function

    def __call__(self, block: Callable, *args: Any, **kwargs: Any) -> Any:
        """Checkpoint a block that takes its scope along."""
        # Compiled code is not called again to be recomputed.
        if self.dispatcher.current.scope is not None and not torch.compiler.is_compiling():
            self.dispatcher.current.scope.by_layer = True  # what a block takes from outside, it cannot compute again
            block = _Block(self.dispatcher, block)
        return self.function(block, *args, **kwargs)


class _Block:
    """One execution of a checkpointed block: the forward, then any number of recomputations."""

    def __init__(self, dispatcher: Dispatcher, function: Callable) -> None:
        self.dispatcher = dispatcher
        self.function = function
        scope = dispatcher.current.scope
        assert scope is not None
        self.scope: Scope = scope
        self.under_gradient = torch.is_grad_enabled()
        self.reentrant = False
        self.taken_inside: set[str] | None = None  # adapters whose route this block took

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.taken_inside is not None:
            with self.dispatcher.entered(self._scope_of_forward()):
                return self.function(*args, **kwargs)
        # The reentrant variant runs its forward without gradient, so a route taken in it has no graph.
        self.reentrant = self.under_gradient and not torch.is_grad_enabled()
        before = set(self.scope.routes)
        try:
            return self.function(*args, **kwargs)
        finally:
            self.taken_inside = set(self.scope.routes) - before

    def _scope_of_forward(self) -> Scope:
        """The forward's scope as the block found it: what it took itself, it takes again."""
        taken = self.taken_inside or set()
        routes = {name: route for name, route in self.scope.routes.items() if name not in taken}
        if self.reentrant:
            routes = {name: route.detach() for name, route in routes.items()}
        features = {name: feature for name, feature in self.scope.features.items() if name not in taken}
        recomputed = {name: feature for name, feature in self.scope.features.items() if name in taken}
        gathered = {} if self.reentrant else self.scope.gathered  # that variant has a graph for every block
        mine: dict[str, Any] = dict(routes=routes, features=features, recomputed=recomputed, gathered=gathered)
        return replace(self.scope, **mine, trains=False, mixes={}, adapted=None)


def checkpointed_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a transformers model that checkpoint blocks once it is asked to."""
    return [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) or "gradient_checkpointing" in vars(module)
    ]


def keep_routes(dispatcher: Dispatcher, modules: list[nn.Module]) -> None:
    """Wrap the checkpoint function of every module that has checkpointing switched on."""
    module: Any
    for module in modules:
        if module.gradient_checkpointing and not isinstance(
            module._gradient_checkpointing_func, RouteKeepingCheckpoint
        ):
            module._gradient_checkpointing_func = RouteKeepingCheckpoint(
                dispatcher, module._gradient_checkpointing_func
            )


def release_routes(modules: list[nn.Module]) -> None:
    """Put back the checkpoint functions that `keep_routes` wrapped."""
    module: Any
    for module in modules:
        function = vars(module).get("_gradient_checkpointing_func")
        if isinstance(function, RouteKeepingCheckpoint):
            module._gradient_checkpointing_func = function.function
