"""Laws of score against size: a power law with a floor, its confidence band, and where one law overtakes another.

The error of a score, what it lacks of the best one possible, falls as a power of the size (parameters, rank, number of
experts) to a floor that no size undercuts:

    ceiling − score = a · x^(−b) + c,    a ≥ 0,  b > 0,  0 ≤ c.

Scores in percent have the ceiling 100, so the score saturates at 100 − c. For a given b the law is linear in a and c;
the b of least squares is looked for on a grid and polished by `scipy.optimize.least_squares`. All runs are fitted with
equal weight, not their means.

Confidence bands are percentiles of a bootstrap, a refit on each of many resamples, so they respect the bounds, which a
covariance would not. With five seeds or more that each have a run at every size, whole seeds are resampled, for runs of
one seed share their data and are not independent; from as few as five the bands are still narrow. Otherwise residuals
are resampled, enlarged by √(N / (N − fitted)) for what the fit has already explained; that takes runs for independent,
and is too narrow where the seed matters more than the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

POWERS = (0.01, 10.0)
"""Smallest and largest b. Below, the law is that of a logarithm in all that is measured; above, that of a step."""

SEEDS = 5
"""Seeds from which on whole seeds are resampled."""

_GRID = np.geomspace(*POWERS, 361)


@dataclass(frozen=True)
class PowerLaw:
    """A fitted law ``score = ceiling − a · x^(−b) − c``.

    Attributes
    ----------
    a, b, c : float
        The parameters; b is NaN where the score does not rise, and a is then 0.
    ceiling : float
        The best possible score.
    low, high : float
        Smallest and largest size that was fitted. Everything beyond is extrapolation.
    runs, sizes : int
        How many runs and different sizes were fitted.
    spread : float
        Standard deviation of the residuals; NaN where there are no more runs than parameters.
    resampled : str
        "seeds", "runs", or "nothing" where the residuals tell nothing.
    level : float
        Share of the bootstrap inside the bands.
    flags : tuple of str
        What is to be known before the law is believed; empty if nothing is.
    draws : ndarray of shape (draws, 3)
        a', b and c of every resample, where a' is the error above the floor at size `unit`.
    unit : float
        The geometric mean of the sizes.
    """

    a: float
    b: float
    c: float
    ceiling: float
    low: float
    high: float
    runs: int
    sizes: int
    spread: float
    resampled: str
    level: float
    flags: tuple[str, ...]
    unit: float
    draws: np.ndarray = field(repr=False, compare=False)

    def predict(self, sizes: Any) -> np.ndarray:
        """The score of the law at sizes."""
        sizes = _positive("sizes", sizes)
        if self.a == 0:
            return np.full(sizes.shape, self.ceiling - self.c)
        return self.ceiling - np.exp(np.log(self.a) - self.b * np.log(sizes)) - self.c

    def sample(self, sizes: Any) -> np.ndarray:  # (draws, sizes)
        """The scores of all resamples at sizes."""
        z = np.log(_positive("sizes", sizes) / self.unit)
        return self.ceiling - self.draws[:, :1] * np.exp(-self.draws[:, 1:2] * z) - self.draws[:, 2:]

    def band(self, sizes: Any) -> tuple[np.ndarray, np.ndarray]:
        """The lower and the upper end of the confidence band at sizes; NaN where nothing could be resampled."""
        if not len(self.draws):
            nothing = np.full(_positive("sizes", sizes).shape, np.nan)
            return nothing, nothing.copy()
        tail = (1 - self.level) / 2
        low, high = np.quantile(self.sample(sizes), [tail, 1 - tail], axis=0)
        return low, high

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The confidence intervals of ``b`` and of ``best``, the score that the law approaches."""
        tail = (1 - self.level) / 2
        if not len(self.draws) or np.isnan(self.b):
            return {"b": (np.nan, np.nan), "best": (np.nan, np.nan)}
        known = {"b": self.draws[:, 1], "best": self.ceiling - self.draws[:, 2]}
        return {name: tuple(np.quantile(values, [tail, 1 - tail]).tolist()) for name, values in known.items()}

    def table(self, points: int = 60) -> pd.DataFrame:
        """The law over the sizes that were fitted, for a plot: columns ``x``, ``score``, ``low`` and ``high``."""
        sizes = np.geomspace(self.low, self.high, points)
        low, high = self.band(sizes)
        return pd.DataFrame({"x": sizes, "score": self.predict(sizes), "low": low, "high": high})


def fit_power_law(
    sizes: Sequence[float] | np.ndarray | pd.Series,  # (N,)
    scores: Sequence[float] | np.ndarray | pd.Series,  # (N,)
    *,
    seeds: Sequence[Any] | np.ndarray | pd.Series | None = None,  # (N,)
    ceiling: float = 100.0,
    level: float = 0.95,
    draws: int = 1000,
    random_state: int = 0,
) -> PowerLaw:
    """Fit a power law with a floor to the scores of runs.

    Parameters
    ----------
    sizes, scores : array-like of N numbers
        Of every run. A run whose score is not finite (it failed) does not count; the law says so in its flags.
    seeds : array-like of N, optional
        Seeds of the runs, to resample those; see the module.
    ceiling : float
        The best possible score.
    level : float
        Of the confidence bands.
    draws : int
        Resamples.
    random_state : int
        Seed of the resampling. Laws over the same seeds of runs draw the same ones, so their difference is paired.

    Returns
    -------
    PowerLaw
        Its flags tell of scores that do not rise, of a power at the end of its range, of too few runs.

    Raises
    ------
    ValueError
        If lengths differ, a size is not positive, a score exceeds the ceiling, fewer than three sizes have a score, or
        an option cannot be.
    """
    if not 0 < level < 1 or isinstance(draws, bool) or draws < 2:
        raise ValueError(f"level is between 0 and 1 and draws at least 2, got {level} and {draws}")
    x, y = _numbers("sizes", sizes), _numbers("scores", scores)
    groups = None if seeds is None else np.asarray(seeds)
    if x.shape != y.shape or (groups is not None and groups.shape != x.shape):
        told = f" and {groups.shape[:1]} seeds" if groups is not None else ""
        raise ValueError(f"every run has a size, a score and perhaps a seed, got {x.shape}, {y.shape}{told}")
    kept = np.isfinite(y)
    flags = [f"{(~kept).sum()} of {len(y)} runs have no finite score"] if not kept.all() else []
    x, y, groups = _positive("sizes", x[kept]), y[kept], None if groups is None else groups[kept]
    distinct = np.unique(x)
    if len(distinct) < 3:
        raise ValueError(f"a power law with a floor needs scores of at least 3 sizes, got {len(distinct)}")
    if y.max() > ceiling:
        raise ValueError(f"no score exceeds the ceiling {ceiling:g}, found {y.max():g}")
    errors, unit = ceiling - y, float(np.exp(np.log(distinct).mean()))
    z = np.log(x / unit)
    best = _polished(errors, z, _projected(np.ones((1, len(x))), errors[None], z, _GRID)[0])
    fitted = best[0] * np.exp(-best[1] * z) + best[2]
    flat = np.ptp(fitted) <= 1e-9 * max(1.0, float(np.abs(errors).max()))
    flags += _flags(best, flat, len(x), len(distinct))
    found, how = _resampled(errors, fitted, z, groups, best, 1 if flat else 3, draws, random_state)
    free = len(x) - (1 if flat else 3)
    a = 0.0 if flat else float(np.exp(np.log(best[0]) + best[1] * np.log(unit)))
    return PowerLaw(
        a=a,
        b=np.nan if flat else float(best[1]),
        c=float(fitted.mean() if flat else best[2]),
        ceiling=float(ceiling),
        low=float(distinct[0]),
        high=float(distinct[-1]),
        runs=len(x),
        sizes=len(distinct),
        spread=float(np.sqrt(((errors - fitted) ** 2).sum() / free)) if free > 0 else np.nan,
        resampled=how,
        level=level,
        flags=tuple(flags),
        unit=unit,
        draws=found,
    )


def _projected(weights: np.ndarray, errors: np.ndarray, z: np.ndarray, powers: np.ndarray) -> np.ndarray:
    """Least squares over a grid of powers: a', b and c of each of M problems, with a' and c not negative.

    Parameters
    ----------
    weights, errors : ndarray of shape (M, N) or (1, N)
        Of every problem.
    z : ndarray of shape (N,)
        Logarithms of the sizes over the unit.
    powers : ndarray of shape (B,)
        The grid.
    """
    basis_NB = np.exp(-z[:, None] * powers)
    weighted = weights * errors
    total, sum_e, sum_ee = (values.sum(1, keepdims=True) for values in (weights, weighted, weighted * errors))
    sum_f, sum_ff, sum_fe = weights @ basis_NB, weights @ basis_NB**2, weighted @ basis_NB
    spread = total * sum_ff - sum_f**2
    free = np.divide(total * sum_fe - sum_f * sum_e, spread, out=np.zeros_like(sum_fe), where=spread > 1e-12 * sum_ff)
    a = np.maximum(free, 0.0)
    c = (sum_e - a * sum_f) / total
    # Where the floor would be negative, it is 0 and a alone is fitted.
    a = np.where(c < 0, np.maximum(sum_fe / sum_ff, 0.0), a)
    c = np.maximum(c, 0.0)
    loss = sum_ee - 2 * a * sum_fe - 2 * c * sum_e + a**2 * sum_ff + 2 * a * c * sum_f + c**2 * total
    at = loss.argmin(1)
    rows = np.arange(len(at))
    return np.stack([a[rows, at], powers[at], c[rows, at]], 1)


def _polished(errors: np.ndarray, z: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The law of least squares near one on the grid."""
    if start[0] == 0:
        return start
    scale = max(float(np.abs(errors).max()), 1e-300)

    def residuals(law: np.ndarray) -> np.ndarray:
        return law[0] * np.exp(-np.exp(law[1]) * z) + law[2] - errors / scale

    bounds = ([0.0, np.log(POWERS[0]), 0.0], [np.inf, np.log(POWERS[1]), np.inf])
    inside = np.clip([start[0] / scale, np.log(start[1]), start[2] / scale], *bounds)
    with np.errstate(all="ignore"):
        found = least_squares(residuals, inside, bounds=bounds, xtol=1e-14, ftol=1e-14, gtol=1e-14)
    polished = np.array([found.x[0] * scale, np.exp(found.x[1]), found.x[2] * scale])
    better = 2 * found.cost <= (residuals(inside) ** 2).sum()
    return polished if better and np.isfinite(polished).all() else start


def _resampled(
    errors: np.ndarray,
    fitted: np.ndarray,
    z: np.ndarray,
    seeds: np.ndarray | None,
    best: np.ndarray,
    parameters: int,
    draws: int,
    random_state: int,
) -> tuple[np.ndarray, str]:
    """Laws refitted to resamples, and what was resampled."""
    rng = np.random.default_rng(random_state)
    # The power of the law itself is on the grid, so that a law without residuals has a band of no width around it.
    powers = np.sort(np.append(_GRID, best[1]))
    if seeds is not None and _complete(seeds, z):
        _, member = np.unique(seeds, return_inverse=True)
        count = int(member.max()) + 1
        # One seed fewer than there are, so that the spread is not underestimated (Rao and Wu's bootstrap).
        drawn = rng.multinomial(count - 1, np.full(count, 1 / count), size=draws)
        return _projected(drawn[:, member].astype(float), errors[None], z, powers), "seeds"
    free = len(errors) - parameters
    if free <= 0:
        return np.empty((0, 3)), "nothing"
    residuals = (errors - fitted) * np.sqrt(len(errors) / free)
    drawn_errors = fitted + residuals[rng.integers(len(errors), size=(draws, len(errors)))]
    return _projected(np.ones((1, len(errors))), drawn_errors, z, powers), "runs"


def _complete(seeds: np.ndarray, z: np.ndarray) -> bool:
    """Whether there are enough seeds, each with a run at every size."""
    groups = pd.Series(z).groupby(pd.Series(seeds), dropna=False).nunique()
    return len(groups) >= SEEDS and bool((groups == len(np.unique(z))).all())


def _flags(law: np.ndarray, flat: bool, runs: int, sizes: int) -> list[str]:
    """What is to be known of a fit."""
    if flat:
        return ["the score does not rise with the size"]
    flags = []
    if sizes == 3:
        flags.append("three sizes determine the three parameters: how well the law fits cannot be seen")
    elif runs < 6:
        flags.append(f"only {runs} runs")
    if law[1] <= POWERS[0] * 1.02:
        flags.append("the score rises as with the logarithm of the size: no floor is in sight")
    if law[1] >= POWERS[1] / 1.02:
        flags.append("the score stops rising after the smallest size: the power is not determined")
    if law[2] <= 1e-9:
        flags.append("the floor is at its bound 0: the fitted score approaches the ceiling")
    return flags


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        found = np.asarray(
            pd.Series(values).to_numpy(float, na_value=np.nan) if np.ndim(values) == 1 else values, float
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} are numbers, but {error}") from error
    if found.ndim != 1 or not found.size:
        raise ValueError(f"{name} are a row of at least one number, got an array of shape {found.shape}")
    return found


def _positive(name: str, values: Any) -> np.ndarray:
    found = np.asarray(values, dtype=float)
    if not (np.isfinite(found).all() and (found > 0).all()):
        wrong = found[~(np.isfinite(found) & (found > 0))].ravel()[0]
        raise ValueError(f"{name} are positive, found {wrong:g}")
    return found
