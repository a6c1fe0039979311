"""State of a forward under way: what its batch is, and the routes taken in it.

Shape legend: N routed units, F features of a pooled input (see `tucka.ops`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from .inputs import Inputs
from .routing import Route


@dataclass(eq=False)
class Scope:
    """One forward of a model: its inputs, and the routes taken in it by adapter name."""

    inputs: Inputs
    routes: dict[str, Route]
    features: dict[str, Tensor] = field(default_factory=dict)  # (N, F), to take a route again under gradient
    kept: dict[str, Route] = field(default_factory=dict)  # routes of the prompt, valid only where `warm`
    warm: Tensor | None = None  # () whether the cache holds a prompt, where only the device knows
    needs_encoder: bool = False  # encoder outputs came without the route their encoder took
    trains: bool = False  # a training forward: it counts for balancing, and a router may start from it
    shared_input: bool = False  # a layer is applied to something all samples share
    pinned: Route | None = None
    module: nn.Module | None = None  # whose forward this is
    sharded: bool = False  # processes hold parts of a router, and what is written to it in a forward is lost
    mixes: dict[tuple[str, bool], dict[str, Tensor]] = field(default_factory=dict)  # (N, R, R) of every layer, by
    # adapter and whether they were taken under gradient
    by_layer: bool = False  # blocks are checkpointed: what a layer needs, it computes itself
    gathered: dict[Tensor, Tensor] = field(default_factory=dict)  # parameters that processes hold in parts, whole
    recomputed: dict[str, Tensor] = field(default_factory=dict)  # features whose later gradients come from elsewhere
    adapted: tuple[list, Tensor, Tensor] | None = None  # who adapted which tensor last, and to what
    parent: Scope | None = None

    def nested(self, module: nn.Module, inputs: Inputs, inherit_mask: bool) -> Scope:
        """The scope of a pretrained model inside the one that opened this scope: own inputs, the same routes."""
        if inputs.samples is None:
            inputs = inputs._replace(samples=self.inputs.samples)
        if inputs.positions is None and inputs.samples == self.inputs.samples:
            inputs = inputs._replace(positions=self.inputs.positions)
        if inputs.mask is None and inherit_mask:
            inputs = inputs._replace(mask=self.inputs.mask)
        if inputs.labels is None and inputs.samples == self.inputs.samples:
            inputs = inputs._replace(labels=self.inputs.labels)
        return replace(self, inputs=inputs, module=module, shared_input=False, parent=self)

    def holds(self, module: nn.Module) -> bool:
        """Whether a forward of that module is under way."""
        return self.module is module or (self.parent is not None and self.parent.holds(module))


class Current:
    """What holds for the forwards of one thread."""

    def __init__(self) -> None:
        # On the instance: attributes that a first forward adds would make torch.compile compile the second one anew.
        self.scope: Scope | None = None
        self.pinned: Route | None = None
        self.recordings: tuple[tuple[str, list[Route]], ...] = ()  # adapter name, where its routes go
        self.memory: dict[str, Route] | None = None  # routes of the prompt while `generate` runs
        self.prompt: int | None = None  # positions of the prompt while `generate` runs
        self.kept: Any = None  # the mixes of the last route taken without gradient
        self.ready: dict[str, Any] = {}  # updates of layers for the tokens to come, while `generate` runs


class Threads(threading.local):
    """A `Current` for each thread: a model may run in several at once. A copy of a model starts with nothing open.

    What changes lies in `here`, since torch.compile loses what is written to a thread's own attributes: a forward whose
    graph breaks would then go on without its scope.
    """

    def __init__(self) -> None:
        self.here = Current()

    def __deepcopy__(self, memo: dict) -> Threads:
        return Threads()

    def __reduce__(self) -> tuple:
        return Threads, ()


@contextmanager
def replaced(holder: Any, **values: Any) -> Iterator[None]:
    """Set attributes for the duration of a context."""
    before = {name: getattr(holder, name) for name in values}
    for name, value in values.items():
        setattr(holder, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(holder, name, value)
