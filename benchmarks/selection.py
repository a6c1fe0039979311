"""The choice of a learning rate, from validation scores alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

from .results import key_of

SELECTION_SEEDS = (100,)
"""Seeds, and so splits, that choose learning rates; final scores use others."""

STEP = 2.0
"""Ratio of neighbouring learning rates."""

MOST = 6
"""Learning rates that a search tries at most."""


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
    scores = _scores(rows, like, seeds)
    means = {rate: score for rate, score in _means(scores, seeds).items() if not among or rate in among}
    if not means or max(means.values()) == -math.inf:
        raise ValueError(
            f"a learning rate is chosen among those tried on seeds {sorted(seeds)}; "
            f"{like['arm']} on {like['task']} has {len(means)} such, {len(scores)} tried on any of them"
        )
    return max(means, key=means.__getitem__)


def next_learning_rate(
    rows: Sequence[Mapping[str, Any]],
    like: Mapping[str, Any],
    start: Sequence[float],
    seeds: Collection[int] = SELECTION_SEEDS,
) -> float | None:
    """The learning rate that a search for the best tries next: first those of `start`, then, in factors of `STEP`,
    the neighbours of the best so far, until both were tried or there are `MOST`.

    Returns None when there is nothing left to try.
    """
    means = _means(_scores(rows, like, seeds), seeds)
    wanted = [rate for rate in start if rate not in means]
    if not wanted and max(means.values()) > -math.inf:
        best = max(means, key=means.__getitem__)
        wanted = [rate for rate in (best * STEP, best / STEP) if rate not in means]
    return wanted[0] if wanted and len(means) < MOST else None


def _scores(
    rows: Sequence[Mapping[str, Any]], like: Mapping[str, Any], seeds: Collection[int]
) -> dict[float, dict[int, float]]:
    """Validation scores by learning rate and seed; a run that failed has the worst."""
    scores: dict[float, dict[int, float]] = {}
    for row in rows:
        if setting_of(row) == setting_of(like) and int(row["seed"]) in seeds:
            score = -math.inf if row["error"] else float(row["validation"])
            scores.setdefault(float(row["learning_rate"]), {})[int(row["seed"])] = score
    return scores


def _means(scores: Mapping[float, Mapping[int, float]], seeds: Collection[int]) -> dict[float, float]:
    """The mean of every learning rate that was tried on all seeds."""
    return {rate: fmean(tried.values()) for rate, tried in sorted(scores.items()) if len(tried) == len(seeds)}
