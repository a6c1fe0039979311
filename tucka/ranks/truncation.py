"""Lower ranks of trained experts, and what that costs.

Shape legend: P and R ranks before, p and r after (see `tucka.ops`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..config import TuckAConfig
from .choice import Unit, spread
from .compression import Fit, Reduced, fit, kept_energy, reduce_family
from .families import (
    Family,
    adapter_parameters,
    families_of,
    pattern_for,
    require_reloadable,
    router_parameters,
)
from .resizing import Parts, largest_core, open_blocks, unwrapped, write_config, write_experts

MARGIN = 0.95
"""Norm of the largest core over its bound that "bounded" experts are written with, where α has to make room."""


class LayerTruncation(NamedTuple):
    """What a truncation did to one layer."""

    layer: str
    rank_before: int
    rank: int
    p_before: int
    p: int
    error: float  # ‖after − before‖ / ‖before‖ over all experts and the shared slice, as they act (with α)


class Truncation(NamedTuple):
    """What a truncation did to an adapter."""

    layers: tuple[LayerTruncation, ...]
    parameters_before: int
    parameters: int
    alpha: float  # of the adapter now: larger than before where "bounded" cores needed room
    normalize: bool | str  # of the adapter now: False where it was True, which has no room for groups of unequal norm

    def __str__(self) -> str:
        width = max(len(line.layer) for line in self.layers)
        lines = [f"{'layer':{width}}  r before  r  p before  p  relative error"] + [
            f"{x.layer:{width}}  {x.rank_before:8}  {x.rank}  {x.p_before:8}  {x.p}  {x.error:.3e}" for x in self.layers
        ]
        return "\n".join([*lines, f"parameters: {self.parameters_before} before, {self.parameters} now"])


def truncate(
    model: nn.Module,
    *,
    ranks: int | dict[str, int] | None = None,
    energy: float | None = None,
    budget: int | None = None,
    p: int | None = None,
    adapter_name: str | None = None,
    optimizer: Any = None,
) -> Truncation:
    """Re-compress trained experts to lower ranks, in place; the result routes, trains, saves and loads as before.

    What is approximated is what acts: for every layer the experts 𝒯 (K, T, D, O) and the shared slice, which U and V
    carry together; layers with shared factors are fitted jointly, and tied D-modes with one U. HOSVD gives a start and
    HOOI improves it. One of `ranks`, `energy` and `budget` says how far. If no rank changes, nothing does.

    Parameters
    ----------
    model : PeftModel
        The adapted model.
    ranks : int or dict, optional
        The rank of every layer that has more, or {pattern: rank} by the rule of `TuckAConfig.rank_pattern`; layers
        that match nothing keep theirs.
    energy : float, optional
        Keep in every layer at least this share of the squared norm, with as few parameters as that takes.
    budget : int, optional
        Trainable parameters of the adapter (`adapter_parameters`: experts and routers), spread over the layers by
        energy kept per parameter.
    p : int, optional
        The shared rank P of all layers, where `ranks` or `budget` is given; default: what it is, but at most T.
    adapter_name : str, optional
        Default: the active adapter.
    optimizer : Optimizer, optional
        Carry its state over. One that was built before and is not given keeps moments of the old shapes: torch refuses
        its next step with a size mismatch (one without moments goes on).

    Returns
    -------
    Truncation
        With the relative error of every layer; `str` of it is a table.

    Raises
    ------
    ValueError
        If not exactly one target is given; if it is out of range, above a layer's rank, different for layers that
        share factors, or below the least budget; if a layer is not finite. The model is then as it was.

    Notes
    -----
    ``normalize=True`` gives the cores of all groups one norm, which leaves no room for the groups of a truncated
    tensor; such an adapter has ``normalize=False`` afterwards. "bounded" stays, and where a core of fewer columns would
    exceed its bound, α is raised and the cores lowered alike. Cores with diagonal blocks become full ones, which cost
    R² where blocks cost R·H: what is truncated little may have more parameters after. Weights of a tensor lasso are
    multiplied into the cores and start at 1 again.
    """
    if sum(given is not None for given in (ranks, energy, budget)) != 1:
        raise ValueError(f"give one of ranks={ranks}, energy={energy} and budget={budget}")
    optimizer = unwrapped(optimizer)
    families = families_of(model, adapter_name)
    name = families[0].adapter_name
    configs: Any = model.peft_config
    config: TuckAConfig = configs[name]
    shared_rank = _checked_p(p, config, energy)
    reduced = [_reduced(family) for family in families]
    if energy is not None:
        chosen, shared_rank, fits = _by_energy(families, reduced, config, energy)
    elif budget is not None:
        fixed = router_parameters(model, name)
        chosen, fits = _by_budget(families, reduced, shared_rank, budget, fixed), None
    else:
        chosen, fits = [_asked_rank(family, ranks) for family in families], None
    require_reloadable(families, chosen, config.share_factors)
    before = adapter_parameters(model, name)
    if chosen == [family.rank for family in families] and shared_rank == config.p:
        return _report(model, families, families, None, config, before)
    if fits is None:
        fits = [
            fit(tensors, rank, _inner(family, shared_rank)) for family, tensors, rank in zip(families, reduced, chosen)
        ]
    parts = [_parts_of(*found) for found in zip(families, reduced, fits)]
    normalize, alpha = config.normalize, config.alpha
    if normalize == "bounded":
        room = max(largest_core(part) for family in parts for part in family) / MARGIN
        if room > 1:
            alpha = alpha * room
            parts = [[_lowered(part, room) for part in family] for family in parts]
    elif normalize is True:
        normalize = False
    lines = [(family.rank, family.shared_ranks) for family in families]
    for family, new in zip(families, parts):
        for experts, part in zip(family.experts, new):
            open_blocks(experts, optimizer)
            write_experts(experts, part, normalize, optimizer)
    pattern = {pattern_for(x.name): r for f, r in zip(families, chosen) for x in f.layers if r != config.r}
    changes = dict(rank_pattern=pattern or None, p=shared_rank, alpha=alpha, normalize=normalize, block_size=None)
    write_config(model, name, **changes)
    return _report(model, families, lines, fits, configs[name], before)


# --- how far ---------------------------------------------------------------------------------------------------------


def _checked_p(p: int | None, config: TuckAConfig, energy: float | None) -> int:
    if p is None:
        return min(config.p, config.t)
    if energy is not None:
        raise ValueError(f"energy={energy} chooses p as well; p={p} goes with ranks or budget")
    if isinstance(p, bool) or not isinstance(p, int) or not 1 <= p <= config.p:
        raise ValueError(f"p={p!r} must be a whole number from 1 to p={config.p} of the adapter")
    return p


def _inner(family: Family, p: int) -> list[int]:
    """P of every layer: layers before the router have a single expert."""
    return [p if family.routed(index) else 1 for index in range(len(family.layers))]


def _reduced(family: Family) -> Reduced:
    with torch.no_grad():
        for layer, experts in zip(family.layers, family.experts):
            held: list[Tensor] = list(experts.state_dict().values())
            if not all(bool(value.isfinite().all()) for value in held):
                raise ValueError(f"layer {layer.name!r} holds values that are not finite: nothing to approximate")
    return reduce_family(family)


def _asked_rank(family: Family, ranks: Any) -> int:
    if isinstance(ranks, dict):
        asked = {ranks.get(get_pattern_key(list(ranks), x.name), family.rank) for x in family.layers}
    else:
        asked = {min(ranks, family.rank) if isinstance(ranks, int) else ranks}
    if len(asked) > 1:
        raise ValueError(f"layer {family.name!r} and those that share its factors have one rank, not {sorted(asked)}")
    (rank,) = asked
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= family.rank:
        raise ValueError(f"rank {rank!r} of {family.name!r} must be a whole number from 1 to its rank r={family.rank}")
    return rank


def _by_budget(families: list[Family], reduced: list[Reduced], p: int, budget: int, fixed: int) -> list[int]:
    held = fixed + sum(family.parameters(family.rank, p, family.width) for family in families)
    if isinstance(budget, int) and held <= budget:
        return [family.rank for family in families]  # also columns that hold nothing yet may learn something
    units = [
        Unit(
            family.name,
            [family.parameters(rank, p) for rank in range(1, family.rank + 1)],
            kept_energy(tensors, _inner(family, p)),
        )
        for family, tensors in zip(families, reduced)
    ]
    return [index + 1 for index in spread(units, budget, fixed)]


def _by_energy(
    families: list[Family], reduced: list[Reduced], config: TuckAConfig, energy: float
) -> tuple[list[int], int, list[Fit]]:
    """Ranks, P and fits of fewest parameters under which no layer loses more than it may."""
    if isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1:
        raise ValueError(f"energy={energy!r} is a share of the squared norm: it must lie in (0, 1]")
    allowed = (1 - energy) ** 0.5 + 1e-7  # rounding of the parameters, in relative error
    best: tuple[int, int, list[Fit]] | None = None
    for p in range(1, min(config.p, config.t) + 1):
        fits = [_least(family, tensors, p, allowed) for family, tensors in zip(families, reduced)]
        if any(found is None for found in fits):
            continue
        whole: list[Any] = fits
        cost = sum(f.parameters(found.input_factor.shape[1], p) for f, found in zip(families, whole))
        if best is None or cost < best[0]:
            best = cost, p, whole
    assert best is not None  # at full rank nothing is lost
    return [found.input_factor.shape[1] for found in best[2]], best[1], best[2]


def _least(family: Family, reduced: Reduced, p: int, allowed: float) -> Fit | None:
    """The fit of least rank whose layers all lose no more than allowed."""
    inner = _inner(family, p)

    def found_at(rank: int) -> Fit | None:
        # What HOOI gains for a family as a whole may cost one of its layers, so the HOSVD is asked as well.
        tried = (fit(reduced, rank, inner, **sweeps) for sweeps in ({}, {"sweeps": 0}))
        return next((found for found in tried if max(found.errors) <= allowed), None)

    low, high, best = 1, family.rank, found_at(family.rank)
    if best is None:
        return None
    while low < high:
        middle = (low + high) // 2
        found = found_at(middle)
        if found is None:
            low = middle + 1
        else:
            high, best = middle, found
    return best


# --- writing ---------------------------------------------------------------------------------------------------------


def _parts_of(family: Family, reduced: Reduced, found: Fit) -> list[Parts]:
    """What every layer of a family shall hold, and how gradients follow: U' = U A, 𝒢 ≈ A 𝒢' Aᵀ, U ≈ U' Aᵀ⁺."""
    u, v = found.input_factor, found.output_factor
    from_u, from_v = (
        torch.linalg.pinv(triangle) @ w for triangle, w in ((reduced.input_triangle, u), (reduced.output_triangle, v))
    )  # (R, r)
    to_u, to_v = u.mT @ reduced.input_triangle, v.mT @ reduced.output_triangle  # (r, R)
    parts = []
    for index, experts in enumerate(family.experts):
        acting_TP = experts.factors[1].detach().double()
        new_Tp = found.expert_factors[index]
        from_p = torch.linalg.pinv(acting_TP) @ new_Tp  # (P, p)
        parts.append(
            Parts(
                found.cores[index],
                new_Tp,
                None if experts.input_factor is None else reduced.input_basis @ u,
                None if experts.output_factor is None else reduced.output_basis @ v,
                found.shared[index],
                {
                    "core": {1: from_p.mT, 2: from_u.mT, 3: from_v.mT},
                    "shared_core": {0: from_u.mT, 1: from_v.mT},
                    "expert_factor": {1: torch.linalg.pinv(new_Tp) @ acting_TP},
                    # Columns that train are mixed with those that are held, whose gradients nothing remembers.
                    "input_factor": {1: to_u} if experts.owner.held_input is None else None,
                    "output_factor": {1: to_v} if experts.owner.held_input is None else None,
                },
            )
        )
    return parts


def _lowered(parts: Parts, by: float) -> Parts:
    """Lower cores, for an α that is raised by as much; gradients of the cores then are larger by as much."""
    shared = None if parts.shared_core is None else parts.shared_core / by
    maps = dict(parts.maps)
    for name in ("core", "shared_core"):
        (mode, matrix), *others = (maps[name] or {}).items()
        maps[name] = {mode: matrix * by, **dict(others)}
    return parts._replace(core=parts.core / by, shared_core=shared, maps=maps)


def _report(
    model: nn.Module, families: list[Family], was: Any, fits: list[Fit] | None, config: TuckAConfig, before: int
) -> Truncation:
    errors = [[0.0] * len(f.layers) for f in families] if fits is None else [found.errors for found in fits]
    held = [(f.rank, f.shared_ranks) for f in families] if fits is None else was
    lines = {
        layer.name: LayerTruncation(
            layer.name, rank, family.rank, inner[index], family.shared_ranks[index], error[index]
        )
        for family, (rank, inner), error in zip(families, held, errors)
        for index, layer in enumerate(family.layers)
    }
    after = adapter_parameters(model, families[0].adapter_name)
    return Truncation(tuple(lines.values()), before, after, config.alpha, config.normalize)
