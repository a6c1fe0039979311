"""Centroids from routing features: k-means for the groups, k-means inside each group for its experts.

Shape legend: N features, F their length, K groups, T experts in a group, C any number of clusters.
"""

from __future__ import annotations

import numpy as np

SLACK = 1.25
"""Size of the largest cluster that balanced k-means allows, over the mean size."""

ROUNDS = 20
"""Most rounds of balanced k-means, each an optimal assignment; it stops when the assignment does."""


def nested_kmeans(
    features: np.ndarray,  # (N, F)
    groups: int,
    experts: int,
    *,
    balanced: bool = False,
) -> np.ndarray:  # (K T, F)
    """Centroids of K groups with T experts each, expert centroids of one group in a row.

    Raises
    ------
    ValueError
        If there are fewer features than centroids.
    """
    if len(features) < groups * experts:
        raise ValueError(
            f"calibration gives {len(features)} features to find k·t={groups}·{experts} centroids in; "
            "give more samples than that"
        )
    labels = (_balanced_labels if balanced else _labels)(features, groups)
    members = [features[labels == group] for group in range(groups)]
    # Features with fewer distinct values than groups leave groups empty: all features stand for theirs.
    return np.concatenate([_inner_centroids(found if len(found) else features, experts) for found in members])


def _labels(features: np.ndarray, clusters: int) -> np.ndarray:  # (N,)
    return _kmeans(features, clusters).labels_


def _kmeans(features: np.ndarray, clusters: int):
    from sklearn.cluster import KMeans

    return KMeans(clusters, n_init=10, random_state=0).fit(features)


def _inner_centroids(members: np.ndarray, experts: int) -> np.ndarray:  # (T, F)
    """k-means inside a group; where members are too few or all alike, their mean stands for the rest."""
    distinct = len(np.unique(members, axis=0))
    clusters = min(experts, distinct)
    centroids = _kmeans(members, clusters).cluster_centers_ if clusters > 1 else members.mean(0, keepdims=True)
    return np.concatenate([centroids, np.repeat(members.mean(0, keepdims=True), experts - clusters, axis=0)])


def _balanced_labels(features: np.ndarray, clusters: int) -> np.ndarray:  # (N,)
    """k-means whose assignment step is the cheapest one with no cluster above `SLACK` times the mean size."""
    from scipy.optimize import linear_sum_assignment

    centroids = _kmeans(features, clusters).cluster_centers_
    capacity = int(np.ceil(SLACK * len(features) / clusters))
    labels = np.full(len(features), -1)
    for _ in range(ROUNDS):
        distances_NC = np.square(features[:, None] - centroids[None]).sum(-1)
        seats = linear_sum_assignment(np.repeat(distances_NC, capacity, axis=1))[1]
        before, labels = labels, seats // capacity
        centroids = np.stack(
            [features[labels == c].mean(0) if (labels == c).any() else centroids[c] for c in range(clusters)]
        )
        if (labels == before).all():
            break
    return labels
