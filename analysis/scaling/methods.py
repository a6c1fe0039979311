"""Laws of several methods, and the size at which one overtakes another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from analysis.scaling.power_law import PowerLaw, fit_power_law

POINTS = 513
"""Sizes at which laws are compared, evenly spaced in their logarithm."""


class BreakEven(NamedTuple):
    """Where one law overtakes another.

    Attributes
    ----------
    size : float or None
        The size from which on the first law is above the second; None if that does not happen in the measured range.
    low, high : float
        The confidence interval of that size. 0 is "ahead from the smallest measured size on or before", infinity "not
        at the largest measured size yet"; NaN where a law has no band.
    share : float
        Share of the resamples in which the first law overtakes the second within the measured range.
    ahead : str
        "first" or "second" if that law is above throughout the measured range, "first from the size on", "second from
        some size on" if the first loses its lead, or "neither" for equal laws.
    measured : tuple of float
        The range of sizes in which both laws were measured.
    """

    size: float | None
    low: float
    high: float
    share: float
    ahead: str
    measured: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.measured
        if self.size is None:
            return f"none in the measured range ({low:g} to {high:g}): ahead is {self.ahead}"
        if np.isnan(self.low):
            return f"at {self.size:g} (no interval; measured {low:g} to {high:g})"
        ends = [f"{end:g}" if low <= end <= high else "beyond what is measured" for end in (self.low, self.high)]
        return f"at {self.size:g} (from {ends[0]} to {ends[1]}; measured {low:g} to {high:g})"


def break_even(first: PowerLaw, second: PowerLaw) -> BreakEven:
    """Find the size from which on the first law is above the second, within the range where both were measured.

    Nothing is extrapolated, and a lead that is lost again within the range does not count. The interval holds
    `first.level` of the resamples, whose laws are compared in pairs.

    Raises
    ------
    ValueError
        If the laws were measured at no common size.
    """
    low, high = max(first.low, second.low), min(first.high, second.high)
    if low >= high:
        raise ValueError(
            f"the laws were measured at sizes {first.low:g} to {first.high:g} and {second.low:g} to {second.high:g}, "
            "which have no range in common"
        )
    sizes = np.geomspace(low, high, POINTS)
    sizes[[0, -1]] = low, high

    def lead(size: float) -> float:
        return float((first.predict([size]) - second.predict([size]))[0])

    leads = first.predict(sizes) - second.predict(sizes)
    at = _overtaking(leads[None])[0]
    size = None
    if 0 < at < POINTS:
        size = float(brentq(lead, sizes[int(at) - 1], sizes[int(at)])) if leads[int(at) - 1] < 0 else None
    share, ends = np.nan, (np.nan, np.nan)
    if len(first.draws) and len(second.draws):
        count = min(len(first.draws), len(second.draws))
        places = _overtaking(first.sample(sizes)[:count] - second.sample(sizes)[:count])
        share = float(((places > 0) & (places < POINTS)).mean())
        drawn = np.concatenate([[0.0], sizes[1:], [np.inf]])[places]
        tail = (1 - first.level) / 2
        # No interpolation: between a size and infinity there is nothing.
        ends = tuple(np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf").tolist())
    return BreakEven(size, *ends, share, _ahead(leads), (low, high))


def fit_laws(
    runs: pd.DataFrame,
    against: str = "parameters",
    *,
    by: str | None = "method",
    score: str = "score",
    seed: str = "seed",
    **options: Any,
) -> tuple[dict[str, PowerLaw], dict[str, str]]:
    """Fit a law to every method of a table of runs.

    Parameters
    ----------
    runs : DataFrame
        One row per run, as `analysis.sweep` gives.
    against : str
        Column of the size: parameters, a rank, or "experts", which is k·t where there is no such column.
    by : str, optional
        Column that tells the methods apart; None for one law, named "all".
    score, seed : str
        Columns of the score and the seed; without a column of that name, runs have no seed.
    **options
        Of `fit_power_law`.

    Returns
    -------
    fitted : dict of str to PowerLaw
    refused : dict of str to str
        Methods for which no law can be fitted, and why.

    Raises
    ------
    ValueError
        If a column is missing.
    """
    if against == "experts" and "experts" not in runs and {"k", "t"} <= set(runs):
        runs = runs.assign(experts=runs["k"] * runs["t"])
    missing = [name for name in (against, score, by) if name is not None and name not in runs]
    if missing:
        raise ValueError(f"runs lack the columns {', '.join(missing)}; they have {', '.join(map(str, runs.columns))}")
    named = {"all": runs} if by is None else {str(name): rows for name, rows in runs.groupby(by, sort=False)}
    fitted: dict[str, PowerLaw] = {}
    refused: dict[str, str] = {}
    for name, rows in named.items():
        # A method without such a size, as LoRA has no experts, has gaps there.
        sized = rows[rows[against].notna()]
        try:
            fitted[name] = fit_power_law(sized[against], sized[score], seeds=sized.get(seed), **options)
        except ValueError as error:
            refused[name] = str(error)
    return fitted, refused


def law_table(fitted: Mapping[str, PowerLaw]) -> pd.DataFrame:
    """Laws as a table: parameters, intervals of the power and of the best score, and what is to be known of each."""
    lines = []
    for name, law in fitted.items():
        ends = law.intervals()
        lines.append(
            dict(
                method=name,
                a=law.a,
                b=law.b,
                b_low=ends["b"][0],
                b_high=ends["b"][1],
                best=law.ceiling - law.c,
                best_low=ends["best"][0],
                best_high=ends["best"][1],
                spread=law.spread,
                runs=law.runs,
                sizes=law.sizes,
                resampled=law.resampled,
                remarks="; ".join(law.flags),
            )
        )
    return pd.DataFrame(lines)


def _overtaking(leads: np.ndarray) -> np.ndarray:  # (M,) of (M, POINTS)
    """The first point of the last stretch in which a curve leads; 0 if it always does, POINTS if not at the end."""
    behind = ~(leads > 0)
    return np.where(behind.any(1), leads.shape[1] - behind[:, ::-1].argmax(1), 0)


def _ahead(leads: np.ndarray) -> str:
    if not leads.any():
        return "neither"
    if (leads >= 0).all() or (leads <= 0).all():
        return "first" if leads.max() > 0 else "second"
    return "first from the size on" if leads[-1] > 0 else "second from some size on"
