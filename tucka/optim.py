"""Optimiser helpers: parameter groups with their own learning rates, and steps that leave unselected groups alone.

Shape legend: K groups, P rank shared in a group, R rank of an expert (see `tucka.ops`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .model import layers_of, single_adapter_name

KINDS = {"core": "cores", "shared_core": "cores", "axis_core": "cores"}
"""The group of a parameter of the experts; that of all others is "factors"."""

APART = {"shared_core": "shared_core", "axis_core": "shared_core", "expert_factor": "expert_factor"}
"""Parameters of the experts that are in a group apart where that is given a rate, and the group."""


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    factor_lr: float | None = None,
    core_lr: float | None = None,
    router_lr: float | None = None,
    expert_lr: float | None = None,
    shared_lr: float | None = None,
    weight_decay: float = 0.0,
    adapter_weight_decay: float = 0.0,
    adapter_name: str | None = None,
) -> list[dict[str, Any]]:
    """Groups for a torch optimiser: every parameter that trains, exactly once.

    ============= ==================================================== ============= ========================
    ``name``      parameters                                           learning rate weight decay
    ============= ==================================================== ============= ========================
    cores         ``core``; without `shared_lr`, ``shared_core`` and   `core_lr`     `adapter_weight_decay`
                  ``axis_core``
    shared_core   ``shared_core``, ``axis_core``: what always acts     `shared_lr`   `adapter_weight_decay`
    factors       ``input_factor``, ``output_factor``, ``lasso_…``;    `factor_lr`   `adapter_weight_decay`
                  without `expert_lr`, ``expert_factor``
    expert_factor ``expert_factor``, which mixes a group's experts     `expert_lr`   `adapter_weight_decay`
    router        ``centroids``                                        `router_lr`   `adapter_weight_decay`
    other         everything else that trains, so heads                `lr`          `weight_decay`
    ============= ==================================================== ============= ========================

    Parameters
    ----------
    model : PeftModel
        The adapted model.
    lr : float
        Learning rate of every group that is given none.
    factor_lr, core_lr, router_lr, expert_lr, shared_lr : float, optional
        Learning rates of those groups; 0 holds a group where it is. On data of one kind, whose groups have nothing to
        tell apart, `core_lr` at a quarter of `lr` with `shared_lr` at `lr` scored half a point more
        (docs/results/quality.md).
    weight_decay : float
        Of what is not the adapter's; biases included.
    adapter_weight_decay : float
        Of the adapter. Decay pulls the experts of rarely chosen groups to zero, and centroids off their clusters.
    adapter_name : str, optional
        Leave out the experts and routers of all other adapters; default: whatever trains.

    Returns
    -------
    list of dict
        With keys ``name``, ``parameter_names``, ``params``, ``lr`` and ``weight_decay``; empty groups are left out.

    Raises
    ------
    ValueError
        If the model has no Tucker experts, no such adapter, or nothing that trains.

    Examples
    --------
    >>> optimizer = torch.optim.AdamW(tucka.param_groups(model, 1e-3, core_lr=5e-3))  # doctest: +SKIP
    """
    wanted = None if adapter_name is None else single_adapter_name(model, adapter_name)
    rates = {
        "cores": core_lr,
        "shared_core": shared_lr,
        "factors": factor_lr,
        "expert_factor": expert_lr,
        "router": router_lr,
        "other": None,
    }
    kinds = _kinds(model, {name: group for name, group in APART.items() if rates[group] is not None})
    if not kinds:
        raise ValueError("the model has no Tucker experts; wrap it with tucka.apply first")
    groups: dict[str, dict[str, Any]] = {
        name: {
            "name": name,
            "parameter_names": [],
            "params": [],
            "lr": lr if rate is None else rate,
            "weight_decay": weight_decay if name == "other" else adapter_weight_decay,
        }
        for name, rate in rates.items()
    }
    for name, parameter in model.named_parameters():  # a shared parameter comes once
        kind, owner = kinds.get(parameter, ("other", wanted))
        if parameter.requires_grad and (wanted is None or owner == wanted):
            groups[kind]["params"].append(parameter)
            groups[kind]["parameter_names"].append(name)
    filled = [group for group in groups.values() if group["params"]]
    if not filled:
        raise ValueError(f"none of the model's {sum(1 for _ in model.parameters())} parameters trains")
    return filled


def _kinds(model: nn.Module, apart: dict[str, str]) -> dict[nn.Parameter, tuple[str, str]]:
    """The group and the adapter of every parameter that is an adapter's; those set apart are groups of their own."""
    groups = KINDS | apart
    kinds: dict[nn.Parameter, tuple[str, str]] = {}
    for layer in layers_of(model):
        for adapter, experts in layer.tucka_experts.items():
            for name, parameter in experts.named_parameters():
                kinds[parameter] = (groups.get(name, "factors"), adapter)
        for adapter, router in layer.tucka_router.items():
            kinds.update(dict.fromkeys(router.parameters(), ("router", adapter)))
    return kinds


# --- unselected groups -----------------------------------------------------------------------------------------------


def hold_unselected(optimizer: torch.optim.Optimizer, model: nn.Module, adapter_name: str | None = None) -> HeldGroups:
    """Let an optimiser change the cores of a group only in steps that some unit chose it for.

    Momentum and weight decay move a parameter whose gradient is zero. With this, the core slice of a group whose
    accumulated gradient is entirely zero keeps its bits in that step, and so do the optimiser's state tensors of that
    slice. Everything happens on the device, by selection; nothing waits for it.

    Only cores are held: the always-active slice, factors, router and heads are shared by all groups. Counters that an
    optimiser keeps per parameter (Adam's step) go on for the whole core.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any whose state is laid out like its parameters; an accelerate `AcceleratedOptimizer` is unwrapped.
    model : PeftModel
        The adapted model.
    adapter_name : str, optional
        Default: the active adapter.

    Returns
    -------
    HeldGroups
        Its `remove` ends it.

    Raises
    ------
    ValueError
        If the model has no such adapter, or the optimiser holds none of its cores.

    Notes
    -----
    A state tensor that the step itself creates, when a core is stepped for the first time, is zero in unselected
    groups if the optimiser decays weights, as torch's optimisers start theirs. Optimisers that pack their state into
    blocks (8-bit ones) or parameters into shards are not covered.

    Examples
    --------
    >>> optimizer = torch.optim.AdamW(tucka.param_groups(model, 1e-3, adapter_weight_decay=0.01))  # doctest: +SKIP
    >>> held = hold_unselected(optimizer, model)  # doctest: +SKIP
    >>> Trainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()  # doctest: +SKIP
    >>> held.remove()  # doctest: +SKIP
    """
    from accelerate.optimizer import AcceleratedOptimizer  # PEFT needs it, but only training does here

    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    name = single_adapter_name(model, adapter_name)
    layers = [layer for layer in layers_of(model) if name in layer.tucka_experts]
    cores: list[Any] = [layer.tucka_experts[name].core for layer in layers]
    stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    held = [core for core in cores if core in stepped]
    if not held:
        raise ValueError(
            f"the optimizer holds {len(held)} of the {len(cores)} cores of adapter {name!r}: build it from the "
            "model's trainable parameters after wrapping"
        )
    return HeldGroups(optimizer, held)


class HeldGroups:
    """Hooks on an optimiser that undo a step where a core slice had no gradient.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    cores : list of Parameter, each (K, P, R, R)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, cores: list[nn.Parameter]) -> None:
        self._cores = cores
        self._before: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._hold),
        )

    def remove(self) -> None:
        """Let the optimiser step as it does by itself again."""
        for handle in self._handles:
            handle.remove()
        self._before = []

    @torch.no_grad()
    def _remember(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._before = [
            (core.clone(), {key: value.clone() for key, value in _state(optimizer, core).items()})
            for core in self._cores
        ]

    @torch.no_grad()
    def _hold(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        # Only now, because a closure computes its gradients inside the step.
        before, self._before = self._before, []
        decaying = {p for group in optimizer.param_groups if group.get("weight_decay") for p in group["params"]}
        for core, (value, state) in zip(self._cores, before):
            if core.grad is None:
                unselected_K = torch.ones(len(core), dtype=torch.bool, device=core.device)
            else:
                unselected_K = (core.grad == 0).flatten(1).all(1)
            _put_back(core, value, unselected_K)
            for key, entry in _state(optimizer, core).items():
                if key in state:
                    _put_back(entry, state[key], unselected_K)
                elif core in decaying:
                    _put_back(entry, torch.zeros_like(entry), unselected_K)


def _state(optimizer: torch.optim.Optimizer, core: nn.Parameter) -> dict[str, Tensor]:
    """The optimiser's state tensors that have a slice for every group, as the core has."""
    # Reading optimizer.state[core] would make an entry, which changes what the optimiser saves.
    entries = optimizer.state.get(core, {})
    return {
        key: entry
        for key, entry in entries.items()
        if isinstance(entry, Tensor) and entry.ndim > 2 and entry.shape[:2] == core.shape[:2]
    }


def _put_back(held: Tensor, before: Tensor, unselected_K: Tensor) -> None:
    """Write the earlier value into the slices of unselected groups."""
    mask = unselected_K.view(-1, *[1] * (held.ndim - 1))
    held.copy_(torch.where(mask, before, held))
