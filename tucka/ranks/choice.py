"""One budget of parameters spread over several units, each of which may have one of many sizes.

The choice is a multiple-choice knapsack. Greedy: of all steps any unit can take, to the next or to a larger size, the
one of most energy gained per parameter, until none fits. Steps over several sizes are needed because energies need not
be concave in the rank (Sinha and Zoltners 1979, "The multiple-choice knapsack problem", operate on the concave
envelope in the same way). What is lost against the best choice is less than the gain of a single step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Unit(NamedTuple):
    """What is given one size: index 0 is the least it can have."""

    name: str
    costs: Sequence[int]  # increasing
    gains: Sequence[float]  # not decreasing


def spread(
    units: Sequence[Unit],
    budget: int,
    fixed: int = 0,
) -> list[int]:
    """The index of the size of every unit.

    Parameters
    ----------
    units : sequence of Unit
        What to choose sizes for.
    budget : int
        What all costs together must not exceed.
    fixed : int
        Part of the budget that is spent whatever is chosen.

    Raises
    ------
    ValueError
        If the least sizes exceed the budget.
    """
    least = fixed + sum(unit.costs[0] for unit in units)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < least:
        raise ValueError(
            f"budget={budget!r} parameters are too few: with rank 1 in every layer this adapter has {least}"
            + (f", {fixed} of them outside of what ranks change" if fixed else "")
        )
    chosen, left = [0] * len(units), budget - least
    while True:
        best, best_rate = None, 0.0
        for index, (unit, size) in enumerate(zip(units, chosen)):
            for larger in range(size + 1, len(unit.costs)):
                cost = unit.costs[larger] - unit.costs[size]
                if cost > left:
                    break
                rate = (unit.gains[larger] - unit.gains[size]) / max(cost, 1)
                if rate > best_rate:
                    best, best_rate = (index, larger, cost), rate
        if best is None:
            return chosen
        index, larger, cost = best
        chosen[index], left = larger, left - cost
