"""Starts: what experts and routers hold before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import TuckAConfig
from .routing import Router
from .tensors import ExpertTensor

EXPERT_STARTS: dict[str, Callable[[ExpertTensor], ExpertTensor]] = {
    "identity": ExpertTensor.identity_,
    "kaiming": ExpertTensor.kaiming_,
}
"""Data-free starts of the experts, by `TuckAConfig.init_experts`."""


def start_experts(experts: ExpertTensor, config: TuckAConfig) -> None:
    """Fill new experts as the configuration says."""
    if config.init_weights:
        EXPERT_STARTS[config.init_experts](experts)
    else:
        experts.normal_(std=0.02)


def initialize(model: nn.Module, calibration: Iterable[Any], adapter_name: str | None = None) -> None:
    """Start a wrapped model from data: the paper's centroids, from the first batch of `calibration`.

    Without it the same start happens in the first training forward. The model's training mode and the random
    state are left as found.

    Parameters
    ----------
    model : PeftModel
        A model that `tucka.apply` or `peft.get_peft_model` has wrapped.
    calibration : iterable
        Batches the model takes: mappings, tuples of positional arguments, or single tensors.
    adapter_name : str, optional
        The adapter to start; default: the active one.

    Raises
    ------
    ValueError
        If there is no batch, or no such adapter, or it does not start from data.
    """
    from .model import dispatchers_of, layers_of, single_adapter_name

    name = single_adapter_name(model, adapter_name)
    dispatchers = [d for d in dispatchers_of(model).values() if name in d.router_owners]
    starting = [d for d in dispatchers if d.router(name).config.init_router == "perturb"]
    if not starting:
        raise ValueError(
            f"adapter {name!r} draws its centroids without data; only init_router='perturb' starts from it"
        )
    batch = next(iter(calibration), None)
    if batch is None:
        raise ValueError("calibration yields no batch; the start needs one")
    with ExitStack() as stack:
        for dispatcher in starting:
            stack.enter_context(_waiting(dispatcher.router(name)))
            stack.enter_context(dispatcher.calibrating(name))
        for layer in layers_of(model):
            stack.enter_context(layer.only(name))
        stack.enter_context(_as_found(model))
        run_batch(model, batch, next(model.parameters()).device)


@contextmanager
def _waiting(router: Router) -> Iterator[None]:
    """Let a router start (again); one that no batch reached is left as found."""
    before = (router.awaits_start, router.initialised.clone())
    router.awaits_start = True
    router.initialised.fill_(False)
    try:
        yield
    finally:
        if router.awaits_start:
            router.awaits_start = before[0]
            router.initialised.copy_(before[1])


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient; training modes and random state are put back."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def run_batch(model: nn.Module, batch: Any, device: torch.device) -> Any:
    """Call a model on one batch of a loader."""
    batch = _to(batch, device)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    return type(value)(_to(item, device) for item in value) if isinstance(value, (tuple, list)) else value
