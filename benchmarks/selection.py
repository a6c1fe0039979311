"""The choice of a learning rate, from validation scores alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

from .results import key_of

SELECTION_SEEDS = (100, 101)
"""Seeds, and so splits, that choose learning rates; final scores use others."""


def setting_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What runs share that differ in seed and learning rate only: task, arm, settings, epochs, training rows."""
    task, arm, settings, _, _, epochs, train_rows = key_of(row)
    return task, arm, settings, epochs, train_rows


def best_learning_rate(
    rows: Sequence[Mapping[str, Any]],
    like: Mapping[str, Any],
    seeds: Collection[int] = SELECTION_SEEDS,
    among: Collection[float] | None = None,
) -> float:
    """The learning rate with the best mean validation score over the selection seeds.

    Parameters
    ----------
    rows : sequence of mappings
        Runs.
    like : mapping
        Has the task, arm, settings, epochs and training rows that count.
    seeds : collection of int
        A learning rate counts if it was tried on all of them; a run that failed counts as the worst.
    among : collection of float, optional
        The learning rates to choose from; default: all.

    Raises
    ------
    ValueError
        If no learning rate counts.
    """
    scores: dict[float, dict[int, float]] = {}
    for row in rows:
        if setting_of(row) == setting_of(like) and int(row["seed"]) in seeds:
            score = -math.inf if row["error"] else float(row["validation"])
            scores.setdefault(float(row["learning_rate"]), {})[int(row["seed"])] = score
    means = {
        rate: fmean(by_seed.values())
        for rate, by_seed in sorted(scores.items())
        if len(by_seed) == len(seeds) and (not among or rate in among)
    }
    if not means or max(means.values()) == -math.inf:
        raise ValueError(
            f"a learning rate is chosen among those tried on seeds {sorted(seeds)}; "
            f"{like['arm']} on {like['task']} has {len(means)} such, {len(scores)} tried on any of them"
        )
    return max(means, key=means.__getitem__)
