"""Check of the loads: groups that no sample chooses.

Shape legend: K groups, N routed units (see `tucka.ops`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .report import FAIL, PASS, Row, skipped
from .subject import Subject

DEAD = 0.1
"""A group is dead below this part of an even load, as for `tucka.revive`."""

CHANCE = 0.05
"""A group is called dead only if one of half an even load would be as empty with no more than this probability."""


def dead_groups(subject: Subject) -> Row:
    """Every group takes its part of the batch, as far as a batch can tell."""
    config = subject.config
    if config.k == 1:
        return skipped("there is one group")
    if config.routing == "batch":
        return skipped("a batch is one routed unit: count over many (tucka.record_loads)")
    if any(found.router(subject.adapter_name).awaits_start for found in subject.dispatchers.values()):
        return skipped("the router has not started")
    loads = _loads(subject)
    found = {tower: counts for tower, counts in loads.items() if bool((counts < _least(counts)).any())}
    said = "; ".join(_said(tower, counts.tolist()) for tower, counts in (found or loads).items())
    if not found:
        return Row(PASS, said)
    chance = chance_of_empty(config.k, min(int(counts.sum()) for counts in found.values()))
    if chance > CHANCE:
        return skipped(
            f"{said}: too few to tell, a group of half an even load is empty with probability {chance:.2g}; "
            f"give {samples_needed(config.k)} samples or more"
        )
    return Row(
        FAIL,
        f"{said}: a group that takes (almost) no sample learns nothing. One of half an even load would be empty "
        f"with probability {chance:.1g}.",
        "If the batch is a fair sample of the data: tucka.revive(model, loader) gives dead groups half of the busiest "
        "one's samples; before training, init_router='kmeans_balanced' with calibration, and balance_bias=True.",
    )


def _loads(subject: Subject) -> dict[str, Tensor]:  # each (K,)
    """Units of the batch that choose each group, by tower."""
    _, routes = subject.routed()
    return {
        tower: torch.bincount(torch.cat([route.group for route in taken]), minlength=subject.config.k)
        for tower, taken in routes.items()
        if taken
    }


def _least(counts: Tensor) -> float:
    """Units below which a group counts as dead."""
    return DEAD * float(counts.sum()) / len(counts)


def _said(tower: str, counts: list[int]) -> str:
    return f"{tower + ': ' if tower else ''}samples per group {', '.join(map(str, counts))}"


def chance_of_empty(groups: int, units: int) -> float:
    """Probability that a group of half an even load is empty: (1 − 1/2K)^N."""
    return (1 - 1 / (2 * groups)) ** units


def samples_needed(groups: int) -> int:
    """The smallest number of units for which that is improbable enough."""
    return math.ceil(math.log(CHANCE) / math.log(1 - 1 / (2 * groups)))
