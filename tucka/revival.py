"""Revival of dead groups: one that (almost) no unit chooses takes over half of the busiest group's units.

Shape legend: N routed units, K groups, T experts in a group, F features of a pooled input (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .calibration import FeatureReader, as_found, device_of
from .dispatch import Dispatcher
from .model import dispatchers_of, layers_of, single_adapter_name
from .processes import is_distributed
from .recording import unrecorded
from .routing import Route, Router
from .scope import replaced

STEPS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 0.5, 0.25)
"""How far centroids are moved towards their half, in units of its distance from the mean."""

WORTH = 0.05
"""Part of the units that a later (larger) shift must route better to be preferred to an earlier one."""


class Revival(NamedTuple):
    """What a revival did to one router."""

    pairs: tuple[tuple[int, int], ...]  # (revived group, group whose units it shares from now on), in order
    left: tuple[int, ...]  # dead groups that found no units to take over
    before: Tensor  # (K,) load of every group on the calibration units
    after: Tensor  # (K,) the same with the centroids that were written


class _Plan(NamedTuple):
    """A revival and the parameters that make it; nothing is written yet."""

    revival: Revival
    centroids: Tensor  # (K T, F)
    bias: Optional[Tensor]  # (K, T)


def revive(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    adapter_name: str | None = None,
    threshold: float = 0.1,
    samples: int = 512,
) -> dict[str, Revival]:
    """Give every dead group half of the units of the busiest one.

    The features of the busiest group's units are split in two by 2-means. Its centroids move towards the larger half,
    the dead group gets copies that move towards the smaller one, and copies of its cores in every layer, so that an
    output changes only as far as its gates do. Both get the mean of their balancing biases, whose sum over the groups
    stays as it is. With several dead groups each splits the group that is then the busiest.

    Parameters are written in place once everything has been computed, so an optimiser keeps them; its moments stay.
    Training modes, gradients, hooks and random state are left as found, and the forwards count for no recording. In a
    distributed run every process has to call this, and all write what the first one found.

    Parameters
    ----------
    model : PeftModel
        The adapted model.
    calibration : iterable
        Batches the model takes, as in `tucka.initialize`.
    adapter_name : str, optional
        Default: the active adapter.
    threshold : float
        A group is dead if its load is below this part of an even load, so below ``threshold / k``.
    samples : int
        Stop reading batches after so many routed units: samples, or with ``routing="batch"`` whole batches.

    Returns
    -------
    dict of Revival
        By tower name; empty `pairs` where no group was dead. Towers that no batch reached are left out.

    Raises
    ------
    ValueError
        If there is no batch, no such adapter, its router has not started, or an argument is out of range.

    Notes
    -----
    ``affinity="paper"`` with ``t=1`` tells groups apart by the sign of a logit alone, so there most dead groups find
    no centroid that wins half of the units, and are left.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} is a part of an even load: it must lie in (0, 1]")
    if samples < 1:
        raise ValueError(f"samples={samples} is not a number of routed units of at least 1")
    name = single_adapter_name(model, adapter_name)
    dispatchers = dispatchers_of(model, name)
    for dispatcher in dispatchers.values():
        if dispatcher.router(name).awaits_start:
            raise ValueError(
                f"the router of adapter {name!r} has not started, so no group is dead yet; call tucka.initialize"
            )
    features = routing_features(model, name, dispatchers, calibration, samples)
    plans = {tower: _plan(dispatchers[tower].router(name), found, threshold) for tower, found in features.items()}
    plans = _from_first_process(plans)
    for tower, plan in plans.items():
        _write(model, name, dispatchers[tower], plan)
    return {tower: plan.revival for tower, plan in plans.items()}


# --- measuring -------------------------------------------------------------------------------------------------------


def routing_features(
    model: nn.Module, name: str, dispatchers: dict[str, Dispatcher], calibration: Iterable[Any], samples: int
) -> dict[str, Tensor]:
    """The routing features (N, F) of the calibration units, by tower."""
    layers, seen = layers_of(model), 0
    per_sample = all(dispatcher.router(name).per_sample for dispatcher in dispatchers.values())
    reader, device = FeatureReader(layers, name, per_sample=per_sample), device_of(model)
    with ExitStack() as stack:
        for layer in layers:
            # The named adapter alone, whatever is active; what trains is left as it is.
            stack.enter_context(replaced(layer, _active_adapter=[name], _disable_adapters=False))
        stack.enter_context(unrecorded(dispatchers.values()))
        stack.enter_context(as_found(model))
        for batch in calibration:
            seen += reader.read(model, batch, device)
            if seen >= samples:
                break
    if not seen:
        raise ValueError("calibration yields no batch; a revival needs units to split")
    return {tower: torch.cat(parts) for tower, parts in reader.features.items() if parts}


# --- planning --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _plan(router: Router, features: Tensor, threshold: float) -> _Plan:
    """Split the busiest group once for every dead one."""
    groups = router.config.k
    centroids = router.centroids.detach().clone()
    bias = None if router.balance_bias is None else router.balance_bias.clone()
    chosen_N = _route(router, features, centroids, bias).group
    before = share = _shares(chosen_N, groups)
    pairs, left = [], []
    for dead in (share < threshold / groups).nonzero().flatten().tolist():
        if share[dead] >= threshold / groups:
            continue  # an earlier split has given it units
        busiest = int(share.argmax())
        trial = _split(router, features, chosen_N, centroids, bias, dead, busiest)
        chosen = chosen_N if trial is None else _route(router, features, *trial).group
        if trial is None or _shares(chosen, groups)[[dead, busiest]].min() < threshold / groups:
            left.append(dead)
            continue
        (centroids, bias), chosen_N, share = trial, chosen, _shares(chosen, groups)
        pairs.append((dead, busiest))
    revival = Revival(tuple(pairs), tuple(left), before.cpu(), share.cpu())
    return _Plan(revival, centroids.cpu(), None if bias is None else bias.cpu())


def _route(router: Router, features: Tensor, centroids: Tensor, bias: Tensor | None) -> Route:
    """The route of every unit under other centroids and another bias, whatever the affinity is."""
    state = {"centroids": centroids, **({} if bias is None else {"balance_bias": bias})}
    return functional_call(router, state, (features,))


def _shares(chosen_N: Tensor, groups: int) -> Tensor:
    return torch.bincount(chosen_N, minlength=groups) / max(len(chosen_N), 1)


def _split(
    router: Router,
    features: Tensor,  # (N, F)
    chosen_N: Tensor,
    centroids: Tensor,  # (K T, F)
    bias: Tensor | None,  # (K, T)
    dead: int,
    busiest: int,
) -> tuple[Tensor, Tensor | None] | None:
    """Centroids and bias that send the smaller half of the busiest group to the dead one; None: it has no halves.

    The plain shift parts the halves where scores fall with distance and the centroids sit amid their units. Where
    they do not (the paper's affinity is a ratio of a group's own logits) it may part nothing, so other shifts are
    tried and the routes they give compared.
    """
    ours = features[chosen_N == busiest]
    moves = two_means(ours)
    if moves is None:
        return None
    wanted_N = chosen_N.clone()
    wanted_N[chosen_N == busiest] = torch.where(moves, dead, busiest)
    placed = router.placed(ours)
    position = placed.mean(0)
    towards = torch.stack([placed[~moves].mean(0) - position, placed[moves].mean(0) - position])  # (2, Q): stay, move
    gates: Any = _route(router, ours, centroids, bias).gates
    leader = int(gates.argmax(-1).bincount().argmax())  # the strongest expert for most of them
    if bias is not None:
        bias = bias.clone()
        bias[[dead, busiest]] = (bias[dead] + bias[busiest]) / 2
    old_KTF = centroids.unflatten(0, (router.config.k, -1))
    best, best_score = None, 0.0
    for shift in _shifts(towards, position, old_KTF[busiest], leader):
        trial = old_KTF.clone()
        trial[[busiest, dead]] = old_KTF[busiest] + shift
        score = _agreement(_route(router, features, trial.flatten(0, 1), bias).group, wanted_N)
        if score > best_score + WORTH:
            best, best_score = trial.flatten(0, 1), score
        if best_score >= 1 - WORTH:
            break
    return None if best is None else (best, bias)


def _shifts(
    towards: Tensor,  # (2, F), from the mean to the half that stays and to the one that moves
    mean: Tensor,  # (F,), in the centroids' coordinates
    centroids: Tensor,  # (T, F)
    leader: int,
) -> Iterator[Tensor]:  # (2, T, F) each
    """Shifts of a group's T centroids towards its two halves, the plain one first."""
    everyone = torch.ones_like(centroids[:, :1])
    alone = torch.zeros_like(everyone)
    alone[leader] = 1
    # Without the part along the mean feature, which moves the logits of all units the same way.
    sideways = towards - torch.outer(towards @ mean, mean) / mean.square().sum().clamp_min(1e-12)
    for onto_mean in (torch.zeros_like(mean), mean - centroids[leader]):
        for step in STEPS:
            for who in (everyone, alone) if len(centroids) > 1 else (everyone,):
                for direction in (towards, sideways):
                    yield who * (onto_mean + step * direction).unsqueeze(1)


def two_means(features: Tensor) -> Tensor | None:
    """Which units (N,) belong to the smaller of two clusters; None if all features are the same."""
    if len(features) < 2 or bool((features == features[0]).all()):
        return None
    from sklearn.cluster import KMeans  # not needed to use the library, so not imported with it

    points = features.double().cpu().numpy()
    labels = torch.from_numpy(KMeans(2, n_init=4, random_state=0).fit_predict(points)).bool()
    return (labels if 2 * int(labels.sum()) <= len(labels) else ~labels).to(features.device)


def _agreement(chosen_N: Tensor, wanted_N: Tensor) -> float:
    """Share of units routed as wanted in the group where it is smallest."""
    right_N = (chosen_N == wanted_N).float()
    return min(float(right_N[wanted_N == group].mean()) for group in wanted_N.unique())


# --- writing ---------------------------------------------------------------------------------------------------------


def _from_first_process(plans: dict[str, _Plan]) -> dict[str, _Plan]:
    """The first process's plans in a distributed run: replicas must stay the same."""
    if not is_distributed():
        return plans
    box = [plans]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


@torch.no_grad()
def _write(model: nn.Module, name: str, dispatcher: Dispatcher, plan: _Plan) -> None:
    """Write a plan into the router and the cores of every layer it routes."""
    if not plan.revival.pairs:
        return
    router = dispatcher.router(name)
    router.centroids.copy_(plan.centroids)
    if router.balance_bias is not None and plan.bias is not None:
        router.balance_bias.copy_(plan.bias)
    for layer in layers_of(model):
        if layer.dispatcher is not dispatcher or name not in layer.tucka_experts:
            continue
        core: Any = layer.tucka_experts[name].core
        if len(core) == router.config.k:  # a layer before the router carries one expert and no groups
            for dead, busiest in plan.revival.pairs:
                core[dead] = core[busiest]
