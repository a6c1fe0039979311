"""Score against size: tables of runs, Pareto fronts, and how methods' parameters grow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tucka import TuckAConfig

from .parameters import LayerShape, count

GROWTH: dict[str, Mapping[str, Any]] = {
    "lora": {"r": 8},
    "dora": {"r": 8},
    "vera": {"r": 256},
    "hra": {"r": 8},
    "oft": {"block_size": 32},
}
"""Sizes at which the growth of PEFT's methods is shown: PEFT's defaults."""


def trade_off(
    runs: pd.DataFrame,
    method: str = "method",
    parameters: str = "parameters",
    score: str = "score",
) -> pd.DataFrame:
    """Average runs that agree in method and size, and mark the Pareto front of all and that of every method.

    Parameters
    ----------
    runs : DataFrame
        One row per run; a run without a score (it failed) does not count.
    method, parameters, score : str
        Its columns. A higher score is better.

    Returns
    -------
    DataFrame
        Columns ``method``, ``parameters``, ``score`` (mean), ``error`` (standard error; NaN for one run), ``seeds``,
        ``front`` and ``leads`` (on the front of its own method); sorted by size.

    Raises
    ------
    ValueError
        If a column is missing, or no run has a score.
    """
    missing = [name for name in (method, parameters, score) if name not in runs]
    if missing:
        raise ValueError(f"runs lack the columns {', '.join(missing)}; they have {', '.join(map(str, runs.columns))}")
    scored = runs[np.isfinite(runs[score].astype(float))]
    if scored.empty:
        raise ValueError(f"none of {len(runs)} runs has a finite {score}")
    groups = scored.groupby([method, parameters], sort=False)[score]
    table = groups.agg(score="mean", error="sem", seeds="count").reset_index()
    table = table.rename(columns={method: "method", parameters: "parameters"})
    table = table.sort_values(["parameters", "score"], ascending=[True, False], ignore_index=True)
    leads = pd.Series(False, index=table.index)
    for _, own in table.groupby("method"):
        leads[own.index] = pareto_front(own["parameters"].to_numpy(), own["score"].to_numpy())
    front = pareto_front(table["parameters"].to_numpy(), table["score"].to_numpy())
    return table.assign(front=front, leads=leads)


def pareto_front(
    parameters: Sequence[float] | np.ndarray,  # (N,)
    score: Sequence[float] | np.ndarray,  # (N,)
) -> np.ndarray:  # (N,) bool
    """Points that no point of at most their size outscores, nor a smaller one equals."""
    parameters, score = np.asarray(parameters, dtype=float), np.asarray(score, dtype=float)
    if parameters.shape != score.shape:
        raise ValueError(f"every point has a size and a score, got {parameters.shape} and {score.shape}")
    smaller, same = parameters[:, None] > parameters, parameters[:, None] == parameters
    beaten = (smaller & (score[:, None] <= score)) | (same & (score[:, None] < score))
    return ~beaten.any(1) & np.isfinite(score)


def expert_counts(runs: pd.DataFrame, series: str | None = None, score: str = "score") -> pd.DataFrame:
    """Average the score of runs by their number of experts K·T, of columns ``k`` and ``t`` (runs without are left out).

    Returns columns ``experts``, ``score``, ``error``, ``seeds`` and, with `series`, a column ``series`` that says
    "<column>=<value>".
    """
    missing = [name for name in ("k", "t", score, series) if name is not None and name not in runs]
    if missing:
        raise ValueError(f"runs lack the columns {', '.join(missing)}; they have {', '.join(map(str, runs.columns))}")
    table = runs.dropna(subset=["k", "t"])
    table = table.assign(experts=table["k"].astype(int) * table["t"].astype(int))
    table = table[np.isfinite(table[score].astype(float))]
    by = ["experts"] if series is None else [series, "experts"]
    means = table.groupby(by, sort=True)[score].agg(score="mean", error="sem", seeds="count").reset_index()
    if series is None:
        return means
    # Named after sorting, so that r=16 comes after r=2.
    named = [f"{series}={value}" for value in means.pop(series)]
    return means.assign(series=named)


def parameter_scaling(
    against: str,
    values: Iterable[int],
    *,
    config: TuckAConfig | None = None,
    layers: int = 24,
    width: int = 1024,
    r: int = 8,
) -> pd.DataFrame:
    """Trainable parameters of every method on square layers, as their width or the number of experts grows.

    Parameters
    ----------
    against : {"width", "experts"}
        What grows: the layers' features D = O, or K·T (as K groups of the config's T). With "experts", methods without
        experts stay level, and "one LoRA per expert" is what as many separate LoRAs of rank r train.
    values : iterable of int
        Widths, or numbers of experts, which are multiples of T.
    config : TuckAConfig, optional
        TuckA's settings; default: the library's defaults.
    layers, width, r : int
        How many layers, how wide where `against` is "experts", and the rank of separate LoRAs.

    Returns
    -------
    DataFrame
        Columns ``method``, ``x`` and ``parameters``.

    Raises
    ------
    ValueError
        If `against` is neither, or a number of experts is no multiple of T.
    """
    if against not in ("width", "experts"):
        raise ValueError(f"against is 'width' or 'experts', got {against!r}")
    config = TuckAConfig() if config is None else config
    lines = []
    for value in values:
        size, own = (value, config) if against == "width" else (width, _with_experts(config, value))
        shapes = [LayerShape(f"block.{index}.linear", size, size) for index in range(layers)]
        counted = {method: count(shapes, method, **hyper).total for method, hyper in GROWTH.items()}
        if against == "experts":
            counted["one LoRA per expert"] = value * count(shapes, "lora", r=r).total
        counted["tucka"] = count(shapes, "tucka", config=own).total
        lines += [(method, value, parameters) for method, parameters in counted.items()]
    return pd.DataFrame(lines, columns=["method", "x", "parameters"])


def _with_experts(config: TuckAConfig, experts: int) -> TuckAConfig:
    if experts < 1 or experts % config.t:
        raise ValueError(f"{experts} experts are no multiple of t={config.t}")
    plain = {name: getattr(config, name) for name in TuckAConfig.__dataclass_fields__ if name in SIZE_FIELDS}
    return TuckAConfig(**{**plain, "k": experts // config.t})


SIZE_FIELDS = (
    "r", "t", "p", "alpha", "pooling", "components", "normalize", "form", "tie_factors", "share_factors",
    "shared_expert", "trainable", "affinity", "init_router", "init_experts", "block_size", "trained_columns",
    "axis_block_size",
)  # fmt: skip
"""Fields that sizes depend on, and those that must fit them."""
