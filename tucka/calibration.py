"""Running a model over calibration batches and listening to its layers, with everything left as found.

Shape legend: B samples of a batch, N samples in all, D and O features of a layer's two sides, F length of a routing
feature (see `tucka.ops`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .dispatch import Dispatcher
from .layer import TuckALayer
from .processes import is_distributed
from .units import samples_of_rows


class Rows(NamedTuple):
    """Rows of a layer's input."""

    sample: Tensor  # (rows,) sample of the batch that a row belongs to
    keep: Tensor  # (rows,) whether it counts: padding does not


Loss = Callable[[Any, Any], Tensor]
"""Takes a model's output and the batch; returns the loss."""

Listener = Callable[[TuckALayer, Tensor, Tensor, Rows], None]
"""Takes a layer, its input x (rows, D), the other side z (rows, D or O) (an activation or a gradient), and the rows."""


class _Enough(Exception):
    """Ends a forward whose remaining layers have nothing to tell."""


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without trainable parameters or a cache; modes, flags and random state are put back."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # A block that is recomputed would add to a cache a second time.
    caching = [m.config for m in model.modules() if isinstance(m, PreTrainedModel) and vars(m.config).get("use_cache")]
    drawn = random.getstate(), np.random.get_state()  # a loader may draw, and so does a first import of scikit-learn
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    model.eval()
    for module in model.modules():
        # Blocks recompute under this flag alone; what is inside them (dropout) stays in evaluation mode.
        module.training = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for config in caching:
            config.use_cache = False
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training
        for config in caching:
            config.use_cache = True
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])


@contextmanager
def bare(layers: Iterable[TuckALayer]) -> Iterator[None]:
    """Run the base model alone."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.bare())
        yield


def run_batch(model: nn.Module, batch: Any, device: torch.device) -> Any:
    """Call a model on one batch of a loader."""
    batch = _to(batch, device)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return (list if isinstance(value, list) else tuple)(_to(item, device) for item in value)
    return value


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device of its first parameter."""
    return next(model.parameters()).device


# --- routing features ----------------------------------------------------------------------------------------------


class FeatureReader:
    """Reads the routing features of one adapter's towers, one forward after the other.

    Parameters
    ----------
    layers : list of TuckALayer
    adapter_name : str
    per_sample : bool
        Pool every sample on its own, whatever the adapter routes as one.
    """

    def __init__(self, layers: list[TuckALayer], adapter_name: str, per_sample: bool) -> None:
        self.adapter_name, self.per_sample = adapter_name, per_sample
        self.layers = [layer for layer in layers if adapter_name in layer.dispatcher.router_owners]
        self.dispatchers = {layer.dispatcher.name: layer.dispatcher for layer in self.layers}
        self.features: dict[str, list[Tensor]] = {tower: [] for tower in self.dispatchers}  # each (B, F)
        self.samples = 0
        self._read: set[str] = set()

    def read(self, model: nn.Module, batch: Any, device: torch.device) -> int:
        """Run one batch as far as its last router's layer; return how many units it had."""
        self._read.clear()
        handles = [layer.register_forward_pre_hook(self._listen) for layer in self.layers]
        try:
            with torch.no_grad():
                run_batch(model, batch, device)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return max((len(self.features[tower][-1]) for tower in self._read), default=0)

    def _listen(self, layer: Any, args: tuple) -> None:
        dispatcher: Dispatcher = layer.dispatcher
        router, scope = dispatcher.router(self.adapter_name), dispatcher.current.scope
        if scope is None or dispatcher.name in self._read or not router.may_feed(layer.name):
            return
        feature = dispatcher.feature(router, layer.name, args[0], scope.inputs, per_sample=self.per_sample)
        self.features[dispatcher.name].append(feature)
        self._read.add(dispatcher.name)
        if len(self._read) == len(self.dispatchers):
            raise _Enough


# --- activations and gradients -------------------------------------------------------------------------------------


@contextmanager
def listening(layers: Iterable[TuckALayer], additive: bool, gradients: bool, listener: Listener) -> Iterator[None]:
    """Tell a listener of every call of every layer: its input with the other side's activation, or its gradient.

    The other side is what an adapter would add to: the input itself, or with `additive` the output.
    """
    tap = _tap_output if additive else _tap_input
    handles = [tap(layer, gradients, listener) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tap_input(layer: TuckALayer, gradients: bool, listener: Listener) -> RemovableHandle:
    def hook(module: nn.Module, args: tuple) -> Optional[tuple]:
        x = args[0]
        if gradients:
            return (_Tap.apply(_with_gradient(x), x, layer, listener), *args[1:])
        _tell(listener, layer, x, x, _rows(layer, x))
        return None

    # On the layer itself: its base layer is given the updated input.
    return layer.register_forward_pre_hook(hook)


def _tap_output(layer: TuckALayer, gradients: bool, listener: Listener) -> RemovableHandle:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Optional[Tensor]:
        x = args[0]
        if gradients:
            return _Tap.apply(_with_gradient(output), x, layer, listener)
        _tell(listener, layer, x, output, _rows(layer, x))
        return None

    return layer.get_base_layer().register_forward_hook(hook)


def _with_gradient(x: Tensor) -> Tensor:
    """Where nothing trains below a layer, its gradient would end above it."""
    return x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_()


class _Tap(torch.autograd.Function):
    """The identity, whose backward tells the gradient.

    The input goes through autograd's saved tensors, so that gradient checkpointing frees and recomputes it like any
    other.
    """

    @staticmethod
    def forward(ctx: Any, target: Tensor, x: Tensor, layer: TuckALayer, listener: Listener) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.listener, ctx.rows = layer, listener, _rows(layer, x)
        return target.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            _tell(ctx.listener, ctx.layer, x, gradients[0], ctx.rows)
        return gradients[0], None, None, None


def _rows(layer: TuckALayer, x: Tensor) -> Rows | None:
    """The rows of a layer's input; None for one that all samples share (relative positions)."""
    scope = layer.dispatcher.current.scope
    if scope is None or scope.shared_input:
        return None
    return Rows(*samples_of_rows(x, scope.inputs, layer.name))


def _tell(listener: Listener, layer: TuckALayer, x: Tensor, z: Tensor, rows: Rows | None) -> None:
    if rows is not None:
        listener(layer, x.detach().reshape(-1, x.shape[-1]), z.detach().reshape(-1, z.shape[-1]), rows)


def progress_bar(total: int, what: str, shown: bool, unit: str = " samples") -> tqdm:
    """A bar, on the first process alone."""
    hidden = not shown or (is_distributed() and torch.distributed.get_rank() != 0)
    return tqdm(total=total, desc=f"calibration: {what}", unit=unit, disable=hidden, leave=False)
