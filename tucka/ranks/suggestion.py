"""Ranks for every layer from one budget, before training."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..calibration import Loss
from ..config import TuckAConfig
from .choice import Unit, spread
from .families import first_process, pattern_for
from .measurement import Measured, measured


def suggest_ranks(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    budget: int,
    config: TuckAConfig | None = None,
    adapter_name: str | None = None,
    loss: Loss | None = None,
    samples: int = 512,
    max_rank: int = 64,
    relative: bool = True,
    progress: bool = False,
) -> TuckAConfig:
    """Spread one budget of parameters over the layers, where it keeps most of their calibration tensors.

    Every layer starts with rank 1; as long as the budget holds, the layer whose next rank (or one further up) gains
    most energy per parameter gets it. Energies are those of `tucka.ranks.spectra`, at the P of the configuration.
    Layers that share factors have one rank.

    Parameters
    ----------
    model : Module
        A model to adapt, or an adapted one, whose base model is measured; it is left as found.
    calibration : iterable
        Batches the model takes, as in `tucka.initialize`.
    budget : int
        Trainable parameters of the adapter: experts and router, without a head trained beside it.
    config : TuckAConfig, optional
        For a model that is not adapted; default: `tucka.apply.default_config`. Its ranks are not read.
    adapter_name : str, optional
        For an adapted model; default: the active adapter.
    loss, samples, max_rank, progress
        As in `tucka.ranks.spectra`.
    relative : bool
        Energies of a layer count as shares of its own, so every layer alike; otherwise as they are, which for the
        gradient tensor is the descent of the loss to first order, and lets layers of small gradient go without.

    Returns
    -------
    TuckAConfig
        A copy of the configuration whose `rank_pattern` holds the rank of every layer, by keys that match no other.

    Raises
    ------
    ValueError
        If the budget is less than rank 1 everywhere costs, or as `tucka.ranks.spectra` raises.

    Examples
    --------
    >>> config = tucka.suggest_ranks(base, loader, budget=100_000)  # doctest: +SKIP
    >>> model = tucka.apply(base, config, calibration=loader)  # doctest: +SKIP
    """
    with measured(model, calibration, config, adapter_name, samples, loss, max_rank, progress) as found:
        families, used, router = found
        options = [_ranks(one, used, max_rank) for one in families]
        units = [_unit(one, used, relative, ranks) for one, ranks in zip(families, options)]
        chosen = spread(units, budget, router)
        ranks = first_process([of_one[index] for of_one, index in zip(options, chosen)])
        pattern = {pattern_for(layer.name): rank for one, rank in zip(families, ranks) for layer in one.family.layers}
    suggested = copy.deepcopy(used)
    suggested.rank_pattern, suggested.factor_owners = pattern, None
    return suggested


def _unit(one: Measured, config: TuckAConfig, relative: bool, ranks: list[int]) -> Unit:
    """What ranks of a family cost, and the energy they keep."""
    gains = [0.0] * len(ranks)
    for index, (line, energy) in enumerate(zip(one.layers, one.energies)):
        p = config.p if one.family.routed(index) else 1
        kept = line.kept[min(p, len(line.kept)) - 1]
        weight = 1.0 if relative else energy
        gains = [gain + weight * float(kept[rank - 1]) for gain, rank in zip(gains, ranks)]
    costs = [one.family.parameters(rank, config.p, config.block_width(rank), config.trained(rank)) for rank in ranks]
    return Unit(one.family.name, costs, gains)


def _ranks(one: Measured, config: TuckAConfig, max_rank: int) -> list[int]:
    """The ranks that a family may have: those of whole blocks."""
    largest = min(max_rank, one.family.widest)
    return [rank for rank in range(1, largest + 1) if config.has_whole_blocks(rank)]
