"""More groups, or more experts in a group, of a trained adapter, whose function stays what it was.

Shape legend: N routed units, K groups, T experts in a group, F length of a routing feature (see `tucka.ops`).

A new group is a copy of an old one. By the cosine and distance affinities every expert's score holds all others in its
denominator: copies count there for their share of the original (`ops.shared_softmax`), and so every score stays. The
copies then tie, and the first would take all units; their centroids are therefore moved apart, by so little that gates
change by some 1e-6 of themselves and yet units choose between them. With a loader the busiest group is split, along the
line between the means of the two halves of its units.

A new expert in a group is a copy of an old one too: it has its gate, and a part of its row of C.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..model import dispatchers_of, single_adapter_name
from ..ops import safe_norm
from ..revival import routing_features, two_means
from ..routing import Router
from .families import first_process
from .regrouping import Regrouping, regroup
from .resizing import unwrapped

NUDGE = 1e-6
"""How far logits of copies are moved apart, about."""


class Expansion(NamedTuple):
    """What an expansion did to the router of one tower."""

    groups: tuple[int, ...]  # the old group that every group, old or new, holds now
    experts: tuple[int, ...]  # the old expert of every expert of a group
    load: Optional[Tensor]  # (K,) share of the calibration units that choose every group now; None without one


def expand(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    *,
    k: int | None = None,
    t: int | None = None,
    adapter_name: str | None = None,
    samples: int = 512,
    optimizer: Any = None,
) -> dict[str, Expansion]:
    """Add groups or experts, in place, such that outputs stay and what is new receives gradient.

    Parameters
    ----------
    model : PeftModel
        The adapted model; its router has started.
    calibration : iterable, optional
        Batches the model takes: what is copied is then, one after the other, the group (expert) that most units
        choose, and a split group's units are parted. Without, groups (experts) are copied in turn, and the units that
        tell copies apart do so along a random direction: a copy that none prefers learns nothing until one does.
    k, t : int, optional
        Number of groups, of experts in a group, from now on.
    adapter_name : str, optional
        Default: the active adapter.
    samples : int
        How many samples of the calibration to read.
    optimizer : Optimizer, optional
        Carry its state over: copies have their original's. One that was built before and is not given keeps moments
        of the old shapes, and torch refuses its next step.

    Returns
    -------
    dict of Expansion
        By tower name.

    Raises
    ------
    ValueError
        If there is nothing to add, the router has not started, no batch is given, or the function cannot stay:
        ``affinity="paper"`` divides the logits of a group by their norm, which other experts in it would change, and
        with ``t=1`` they are signs, by which no unit can tell a copy from its original. The model is as it was.

    Notes
    -----
    Equal means to some 1e-6 of the update in float32. The choice of a group ignores shares, so no unit changes to
    another group than a copy of its own. ``normalize=True`` leaves no room for experts that share what one gave: with
    `t`, such an adapter has ``normalize=False`` afterwards, and acts as before. Routes that caches or encoder outputs
    hold from before are of the old shape.
    """
    optimizer = unwrapped(optimizer)
    name = single_adapter_name(model, adapter_name)
    config: Any = model.peft_config[name]  # type: ignore[index]
    k, t = _checked(config, "k", k), _checked(config, "t", t)
    if (k, t) == (config.k, config.t):
        raise ValueError(f"nothing to add: the adapter has k={config.k} groups of t={config.t} experts")
    if config.affinity == "paper" and t > config.t:
        raise ValueError(
            f"t={t} cannot leave the function as it is: affinity='paper' divides a group's logits by their norm, which "
            "a copied expert changes. Add groups (k), or train with affinity='cosine' or 'distance'"
        )
    if config.affinity == "paper" and config.t == 1:
        raise ValueError(
            "with affinity='paper' and t=1 scores are signs, so no unit could choose a copied group; "
            "train with affinity='cosine' or 'distance'"
        )
    dispatchers = dispatchers_of(model, name)
    if any(dispatcher.router(name).awaits_start for dispatcher in dispatchers.values()):
        raise ValueError(f"the router of adapter {name!r} has not started; call tucka.initialize")
    features = {} if calibration is None else routing_features(model, name, dispatchers, calibration, samples)
    plans = first_process(
        {tower: _plan(dispatcher.router(name), features.get(tower), k, t) for tower, dispatcher in dispatchers.items()}
    )
    regroup(model, name, plans, optimizer)
    loads = {tower: _load(dispatchers[tower].router(name), seen, k) for tower, seen in features.items()}
    return {t: Expansion(tuple(plan.groups), tuple(plan.experts), loads.get(t)) for t, plan in plans.items()}


@torch.no_grad()
def _load(router: Router, features: Tensor, k: int) -> Tensor:
    return torch.bincount(router(features).group, minlength=k).cpu() / len(features)


def _checked(config: Any, name: str, value: Any) -> int:
    old = vars(config)[name]
    if value is None:
        return old
    if isinstance(value, bool) or not isinstance(value, int) or value < old:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {name}={old}, which the adapter has")
    return value


@torch.no_grad()
def _plan(router: Router, features: Tensor | None, k: int, t: int) -> Regrouping:
    """Which group and expert every new one copies, and how far the centroids of copies are moved apart."""
    config, shape = router.config, (k, router.config.t, router.centroids.shape[1])
    groups, experts = list(range(config.k)), list(range(config.t))
    centroids_KTF = router.centroids.detach().unflatten(0, (config.k, config.t))
    shifts_KTF = centroids_KTF.new_zeros(shape)
    route = None if features is None else router(features)
    generator = torch.Generator().manual_seed(0)
    for index in range(t - config.t):
        experts.append(index % config.t if route is None else _heaviest(route.gates, experts))
    chosen_N = None if route is None else route.group.clone()
    for new in range(config.k, k):
        if chosen_N is None or features is None:
            source, ours = new % config.k, None
        else:
            source = int(torch.bincount(chosen_N, minlength=len(groups)).argmax())
            ours = (chosen_N == source).nonzero().flatten()
        held_TF = centroids_KTF[groups[source]] + shifts_KTF[source]
        scale = 0.5 ** (groups.count(groups[source]) - 1)  # later splits stay on their side of earlier ones
        random_TF = torch.randn(shape[1:], generator=generator).to(held_TF)
        if ours is None or features is None or chosen_N is None:
            shift_TF = _scaled(router, held_TF, random_TF, scale)
        else:
            shift_TF, moves = _parting(router, features[ours], held_TF, random_TF, scale)
            chosen_N[ours[moves]] = new
        groups.append(groups[source])
        shifts_KTF[new] = shifts_KTF[source] - shift_TF
        shifts_KTF[source] += shift_TF
    return Regrouping(groups, experts, shifts_KTF if k > config.k else None)


def _heaviest(gates_NT: Any, experts: list[int]) -> int:
    """The expert whose copies weigh most, each."""
    per_copy = [float(gates_NT[:, index].sum()) / experts.count(index) for index in range(gates_NT.shape[1])]
    return per_copy.index(max(per_copy))


def _parting(
    router: Router,
    features: Tensor,  # (N, F), of the group's units
    held: Tensor,  # (T, F), its centroids
    random: Tensor,  # (T, F)
    scale: float,
) -> tuple[Tensor, Tensor]:  # (T, F), (N,)
    """The shift that parts the units most evenly, of those along their two halves and a random one; and who moves."""
    tried = [*_candidates(router, features, held), random]
    # Measured far enough out to see, and small enough to be linear.
    found = [_preference(router, features, held, _scaled(router, held, shift, 1e3)) for shift in tried]
    moves = [preference < 0 for preference in found]
    sizes = [min(int(move.sum()), len(move) - int(move.sum())) for move in moves]
    best = sizes.index(max(sizes))
    # What moves logits of random features by so much moves those it was made of by more.
    factor = 2e3 * NUDGE / float(found[best].abs().max().clamp_min(2e3 * NUDGE / 10))
    return _scaled(router, held, tried[best], scale * factor), moves[best]


def _candidates(router: Router, features: Tensor, held: Tensor) -> list[Tensor]:  # (T, F) each
    """Towards the halves of 2-means, of all experts and of one alone.

    With and without the part along which all units prefer the same copy: that of their mean, or by distance, of its
    difference from the centroids.
    """
    halves = two_means(features)
    if halves is None:
        return []
    seen = router.placed(features)
    if router.config.affinity == "cosine":
        seen = nn.functional.normalize(seen, dim=-1)
    mean = seen.mean(0)
    common = mean - held.mean(0) if router.config.affinity == "distance" else mean
    direction = seen[~halves].mean(0) - seen[halves].mean(0)
    sideways = direction - common * (direction @ common) / common.square().sum().clamp_min(1e-12)
    alone = torch.eye(len(held), device=held.device, dtype=held.dtype)
    who = [torch.ones_like(alone[0]), *alone] if len(held) > 1 else [alone[0]]
    return [torch.outer(one, along) for one in who for along in (sideways, direction)]


def _scaled(router: Router, held: Tensor, shift: Tensor, scale: float) -> Tensor:
    """A shift at the length that moves logits by about `NUDGE`."""
    config, width = router.config, held.shape[-1]
    if router.spread is not None and config.affinity == "distance":
        length = config.temperature * float(router.spread) ** 0.5 * width**0.5 / 2
    else:
        length = (config.temperature if config.affinity == "cosine" else 1.0) * float(held.norm(dim=-1).mean())
        length *= width**0.5
    return shift / safe_norm(shift, dim=-1).max() * NUDGE * length * scale


def _preference(router: Router, features: Tensor, held: Tensor, shift: Tensor) -> Tensor:
    """By how much every unit prefers the copy at +shift over the one at −shift: log of the ratio of scores, (N,)."""
    trial = copy.deepcopy(router).double()
    trial.config = copy.copy(router.config)
    trial.config.k = 2
    trial.log_share = None  # it does not enter the choice
    trial.centroids = nn.Parameter(torch.cat([held + shift, held - shift]).double())
    scores_N2 = trial.scores(features.double()).amax(-1)
    return (scores_N2[:, 0] / scores_N2[:, 1]).log()
