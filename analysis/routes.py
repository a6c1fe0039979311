"""Who is routed where: router maps, loads over training, and how groups and labels agree.

Shape legend: N routed units, K groups, T experts in a group, F length of a routing feature (see `tucka.ops`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from tucka import ops

from .observations import Observations

GRID = 120
"""Points along each side of the plane whose groups are shown."""


class Regions(NamedTuple):
    """The group chosen at every point of a plane: x (G,), y (G,) and group (G, G), rows along y."""

    x: np.ndarray
    y: np.ndarray
    group: np.ndarray


class RouterMap(NamedTuple):
    """Routing features in two dimensions.

    Attributes
    ----------
    points : ndarray, (N, 2)
    centroids : ndarray, (K·T, 2)
    groups : ndarray, (N,)
        The group each unit was routed to.
    method : str
        "pca", "tsne" or "umap".
    explained : ndarray, (2,), or None
        Shares of the variance along the axes ("pca").
    regions : Regions or None
        Groups on the plane of the first two components through the mean ("pca").
    """

    points: np.ndarray
    centroids: np.ndarray
    groups: np.ndarray
    method: str
    explained: np.ndarray | None
    regions: Regions | None


def router_map(observed: Observations, tower: str | None = None, method: str = "pca", seed: int = 0) -> RouterMap:
    """Map the routing features of observed data, and the centroids among them, to two dimensions.

    Features and centroids are mapped as the affinity compares them: scaled, and for the cosine as unit vectors.

    Parameters
    ----------
    observed : Observations
        From `observe`.
    tower : str, optional
        Whose router; default: the only one.
    method : {"pca", "tsne", "umap"}
        PCA also shows the regions of the groups. UMAP needs the package umap-learn.
    seed : int
        Seed of t-SNE and UMAP.

    Raises
    ------
    ValueError
        If the method is unknown, no or several towers were observed, or there are fewer than 3 points.
    ModuleNotFoundError
        If UMAP is asked for and not installed.
    """
    if method != "pca" and method not in EMBEDDINGS:
        raise ValueError(f"method is one of pca, {', '.join(EMBEDDINGS)}, got {method!r}")
    adapter, routing = observed.adapter, observed.routing[tower_of(observed, tower)]
    router = next(router for router in adapter.routers if router.layer == routing.router)
    unit = adapter.config.affinity == "cosine"
    features = _placed(router.placed(torch.from_numpy(routing.features)), unit)
    centroids = _placed(router.centroids, unit)
    stacked = np.concatenate([features, centroids])
    if len(stacked) < 3:
        raise ValueError(f"a map needs at least 3 points, got {len(features)} units and {len(centroids)} centroids")
    if not np.isfinite(stacked).all():
        raise ValueError("features or centroids are not finite, so there is no map of them")
    if method != "pca":
        placed = EMBEDDINGS[method](stacked, seed)
        return RouterMap(placed[: len(features)], placed[len(features) :], routing.group, method, None, None)
    return _pca_map(features, centroids, routing.group, adapter.config)


def tower_of(observed: Observations, tower: str | None) -> str:
    """The tower asked for, or the only one that was observed.

    Raises
    ------
    ValueError
        If there is no such tower, or several to choose from.
    """
    known = list(observed.routing)
    if not known:
        raise ValueError("nothing was routed: the adapter has no router, or no forward reached it")
    if tower is None and len(known) > 1:
        raise ValueError(f"the adapter has {len(known)} routers; name the tower, one of {known}")
    if tower is not None and tower not in known:
        raise ValueError(f"tower {tower!r} is not one of {known}")
    return known[0] if tower is None else tower


def label_table(
    groups: np.ndarray,  # (N,)
    labels: np.ndarray,  # (N,)
    count: int | None = None,
) -> pd.DataFrame:
    """How many units of every label were routed to every group: labels by groups 0 … K−1.

    Raises
    ------
    ValueError
        If there are not as many groups as labels.
    """
    if len(groups) != len(labels):
        raise ValueError(f"every unit has a group and a label, got {len(groups)} groups and {len(labels)} labels")
    table = pd.crosstab(pd.Series(labels, name="label"), pd.Series(groups, name="group"))
    return table.reindex(columns=range(count if count is not None else int(np.max(groups)) + 1), fill_value=0)


def mutual_information(table: pd.DataFrame) -> dict[str, float]:
    """Mutual information of label and group from a table of counts.

    ``bits``, and ``normalised`` by the arithmetic mean of both entropies (0 where both are 0).
    """
    joint = table.to_numpy(dtype=float)
    total = joint.sum()
    if total <= 0:
        raise ValueError("the table counts 0 units, at least 1 is needed")
    joint = joint / total
    label, group = _entropy(joint.sum(1)), _entropy(joint.sum(0))
    shared = max(label + group - _entropy(joint.ravel()), 0.0)
    mean = (label + group) / 2
    return {"bits": shared, "normalised": shared / mean if mean > 0 else 0.0}


def load_history(log: Iterable[Mapping[str, Any]], phase: str = "load", tower: str | None = None) -> pd.DataFrame:
    """Shares of the groups over training, from a Trainer's log history that `tucka.callbacks.BalanceCallback` wrote.

    Parameters
    ----------
    log : iterable of dict
        ``trainer.state.log_history``, or the ``log_history`` of a ``trainer_state.json``.
    phase : str
        "load" for training, "eval_load" for evaluations.
    tower : str, optional
        For models with several routers.

    Returns
    -------
    DataFrame
        Columns ``step``, ``group`` and ``share``; empty if the log holds no loads.
    """
    pattern = re.compile(rf"{re.escape(phase)}/{re.escape(tower) + '/' if tower else ''}group_(\d+)")
    lines = [
        (entry.get("step", index), int(found[1]), float(value))
        for index, entry in enumerate(log)
        for key, value in entry.items()
        if (found := pattern.fullmatch(key))
    ]
    return pd.DataFrame(lines, columns=["step", "group", "share"])


def _placed(values: torch.Tensor, unit: bool) -> np.ndarray:
    values = values.double()
    return (values / ops.safe_norm(values, dim=-1, keepdim=True) if unit else values).numpy()


def _pca_map(features: np.ndarray, centroids: np.ndarray, groups: np.ndarray, config: Any) -> RouterMap:
    """Map to the first two principal components; centroids take part, so that they lie inside the picture."""
    from sklearn.decomposition import PCA

    pca = PCA(2, svd_solver="full").fit(np.concatenate([features, centroids]))
    points, marks = pca.transform(features), pca.transform(centroids)
    both = np.concatenate([points, marks])
    margin = 0.06 * np.ptp(both, axis=0) + 1e-9
    x, y = (np.linspace(low, high, GRID) for low, high in zip(both.min(0) - margin, both.max(0) + margin))
    plane = pca.inverse_transform(np.stack(np.meshgrid(x, y), -1).reshape(-1, 2))
    nearest = _group_at(plane, centroids, config).reshape(GRID, GRID)
    return RouterMap(points, marks, groups, "pca", pca.explained_variance_ratio_, Regions(x, y, nearest))


def _group_at(points: np.ndarray, centroids: np.ndarray, config: Any) -> np.ndarray:
    """The group of the best centroid; a balancing bias is left out."""
    x, c = torch.from_numpy(points), torch.from_numpy(centroids)
    if config.affinity == "paper":
        scores = ops.paper_affinity(x, c, config.k)
    elif config.affinity == "cosine":
        scores = ops.cosine_affinity(x, c, config.k, config.temperature)
    else:
        scores = ops.distance_affinity(x, c, config.k, config.temperature, torch.ones(()))
    return ops.choose_group(scores).numpy()


def _tsne(values: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(values) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(values)


def _umap(values: np.ndarray, seed: int) -> np.ndarray:
    try:
        from umap import UMAP
    except ImportError as error:
        raise ModuleNotFoundError("method='umap' needs the package umap-learn: pip install umap-learn") from error
    return UMAP(n_neighbors=min(15, len(values) - 1), random_state=seed).fit_transform(values)


EMBEDDINGS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"tsne": _tsne, "umap": _umap}
"""Maps to two dimensions that keep neighbours, by method: from values (N, F) and a seed."""


def _entropy(shares: np.ndarray) -> float:
    """In bits."""
    positive = shares[shares > 0]
    return float(-(positive * np.log2(positive)).sum())
