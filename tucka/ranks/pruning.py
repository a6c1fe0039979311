"""Fewer groups, or fewer experts in a group, of a trained adapter: those of least load go.

Shape legend: K groups, T experts in a group (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..balance import Load, LoadMeter
from ..model import dispatchers_of, single_adapter_name
from ..revival import routing_features
from .families import first_process
from .regrouping import Regrouping, regroup
from .resizing import unwrapped


class Pruning(NamedTuple):
    """What a pruning did to one tower."""

    dropped_groups: tuple[int, ...]  # their old indices
    dropped_experts: tuple[int, ...]  # of every group
    load: Tensor  # (K, T) share of the units of every expert, before
    lost: float  # share of the units that had chosen a dropped group, or a dropped expert before all others


def prune(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    *,
    load: Any = None,
    k: int | None = None,
    t: int | None = None,
    threshold: float = 0.1,
    adapter_name: str | None = None,
    samples: int = 512,
    optimizer: Any = None,
) -> dict[str, Pruning]:
    """Drop the groups (or experts) of least load, in place; units that chose them choose among what is left.

    Parameters
    ----------
    model : PeftModel
        The adapted model.
    calibration : iterable, optional
        Batches the model takes, to measure the load by.
    load : Tensor (K, T), Load, or {tower: either}, optional
        The load instead of a calibration; see `tucka.record_loads`.
    k, t : int, optional
        How many groups, or experts in a group, to keep. Without both, groups whose load is below `threshold` times an
        even load go, in all towers as few as in the one that needs most.
    threshold : float
        Part of an even load.
    adapter_name, samples, optimizer
        As in `tucka.expand`.

    Returns
    -------
    dict of Pruning
        By tower name; where no group is below the threshold nothing is dropped.

    Raises
    ------
    ValueError
        If not exactly one of `calibration` and `load` is given, or one is out of range. The model is then as it was.

    Notes
    -----
    The outputs of units that had not chosen what is dropped change as well, by the affinities' denominators. An expert
    of index j is dropped in all groups, which share the factor C. ``normalize=True`` becomes False where experts go.
    """
    optimizer = unwrapped(optimizer)
    if (calibration is None) == (load is None):
        raise ValueError("give either calibration batches or the load to prune by")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} is a part of an even load: it must lie in (0, 1]")
    name = single_adapter_name(model, adapter_name)
    config: Any = model.peft_config[name]  # type: ignore[index]
    for what, value, old in (("k", k, config.k), ("t", t, config.t)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= old):
            raise ValueError(f"{what}={value!r} must be a whole number from 1 to {what}={old}, which the adapter has")
    dispatchers = dispatchers_of(model, name)
    if any(dispatcher.router(name).awaits_start for dispatcher in dispatchers.values()):
        raise ValueError(f"the router of adapter {name!r} has not started, so no load is its own yet")
    shares = _given(load, dispatchers, config) if load is not None else {}
    if calibration is not None:
        shares = _measured(dispatchers, name, routing_features(model, name, dispatchers, calibration, samples), config)
    shares = first_process(shares)
    if k is None and t is None:
        k = max(int((share.sum(1) >= threshold / config.k).sum()) for share in shares.values())
    plans, reports = {}, {}
    for tower, share in shares.items():
        groups = _busiest(share.sum(1), config.k if k is None else k)
        experts = _busiest(share.sum(0), config.t if t is None else t)
        plans[tower] = Regrouping(groups, experts, split=False)
        gone = [sorted(set(range(size)) - set(kept)) for size, kept in ((config.k, groups), (config.t, experts))]
        lost = float(share.sum() - share[groups][:, experts].sum())
        reports[tower] = Pruning(tuple(gone[0]), tuple(gone[1]), share, lost)
    if any(report.dropped_groups or report.dropped_experts for report in reports.values()):
        regroup(model, name, plans, optimizer)
    return reports


def _busiest(share: Tensor, kept: int) -> list[int]:
    """Indices of the largest, in order; of equals the first."""
    return sorted(share.sort(descending=True, stable=True).indices[:kept].tolist())


def _given(load: Any, dispatchers: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
    by_tower = load if isinstance(load, Mapping) else dict.fromkeys(dispatchers, load) if len(dispatchers) == 1 else {}
    if set(by_tower) != set(dispatchers):
        raise ValueError(f"load is needed for the towers {sorted(dispatchers)}, but is given for {sorted(by_tower)}")
    found = {}
    for tower, given in by_tower.items():
        share = given.expert_share if isinstance(given, Load) else given
        if not isinstance(share, Tensor) or tuple(share.shape) != (config.k, config.t):
            shown = tuple(share.shape) if isinstance(share, Tensor) else type(share).__name__
            raise ValueError(f"load is {shown}, but the adapter's experts are k={config.k} by t={config.t}")
        share = share.detach().double().cpu()
        if not bool(share.isfinite().all()) or bool((share < 0).any()) or not float(share.sum()) > 0:
            raise ValueError("load must be finite and not negative, and something must have been counted")
        found[tower] = share / share.sum()
    return found


@torch.no_grad()
def _measured(dispatchers: Mapping[str, Any], name: str, features: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    missing = sorted(set(dispatchers) - set(features))
    if missing:
        raise ValueError(f"no batch reaches the towers {missing}, so their load is not known; give it (load=...)")
    found = {}
    for tower, seen in features.items():
        meter = LoadMeter(config.k, config.t, seen.device)
        meter.append(dispatchers[tower].router(name)(seen))
        found[tower] = meter.load().expert_share.double().cpu()
    return found
