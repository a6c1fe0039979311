"""Where the router sends samples, in two dimensions of its feature space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgb
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D

from analysis.plots._frame import (
    axes_or_new,
    finite,
    full_name,
    group_palette,
    ordered,
    say_no_values,
    show_groups,
)

_LABEL_MARKERS = ("o", "^", "s", "D", "v", "P")
_METHODS = {"pca": "PC", "tsne": "t-SNE", "t-sne": "t-SNE", "umap": "UMAP"}
_MOST_NUMBERED = 64
"""Centroids up to this number carry theirs."""


def router_map(routes: Any, *, labels: Sequence[Any] | np.ndarray | None = None, ax: Axes | None = None) -> Axes:
    """Draw samples by the group that the router chose, the centroids, and the regions of the groups.

    Parameters
    ----------
    routes : object
        Attributes points (N, 2), centroids (K·T, 2) and groups (N,), whole numbers; method, the name of the
        projection; explained, the shares of variance of both axes or None; regions, None or an object or tuple of
        x (G,), y (G,) and group (G, G), where group[i, j] is the choice at (x[j], y[i]).
    labels : sequence of length N, optional
        Class, domain or task of every sample, shown by the marker if there are at most six; a missing one
        is "unknown".
    ax : Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        Scatters of the samples, one for each marker; a ring for each centroid, with its number up to 64 of them; the
        regions behind. Samples whose projection is not finite are left out.

    Raises
    ------
    ValueError
        If the shapes do not fit each other, or `labels` has another length.
    """
    points, centroids = finite("points", routes.points, "(N, 2)"), finite("centroids", routes.centroids, "(K·T, 2)")
    groups = [int(group) for group in np.asarray(routes.groups).ravel()]
    if points.shape[1] != 2 or centroids.shape[1] != 2 or len(groups) != len(points):
        found = f"{points.shape}, {centroids.shape} and ({len(groups)},)"
        raise ValueError(f"points is (N, 2), centroids is (K·T, 2) and groups is (N,), got {found}")
    kinds = [None] * len(groups) if labels is None else ["unknown" if pd.isna(label) else label for label in labels]
    if len(kinds) != len(groups):
        raise ValueError(f"labels names each of the {len(groups)} points, got {len(kinds)} labels")
    regions = _regions(routes.regions)
    ax = axes_or_new(ax)
    _name_axes(ax, str(routes.method), routes.explained)
    if not (np.isfinite(points).all(axis=1).any() or np.isfinite(centroids).all(axis=1).any()):
        say_no_values(ax)
        return ax
    palette = group_palette([*groups, *(map(int, np.unique(regions[2])) if regions else ())])
    if regions:
        _draw_regions(ax, *regions, palette)
    markers = _draw_points(ax, points, groups, kinds, palette)
    _draw_centroids(ax, centroids)
    _explain(ax, palette, markers)
    return ax


def _regions(regions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return the coordinates and groups of the grid, whether they come as a tuple or as attributes."""
    if regions is None:
        return None
    parts = regions if type(regions) is tuple else (regions.x, regions.y, regions.group)
    x, y, group = (np.asarray(part) for part in parts)
    if group.shape != (*y.shape, *x.shape) or group.size == 0:
        raise ValueError(f"regions is x (G,), y (G,) and group (G, G), got {x.shape}, {y.shape} and {group.shape}")
    return x, y, group


def _name_axes(ax: Axes, method: str, explained: Sequence[float] | None) -> None:
    """Name both axes after the projection, with the share of variance where it has one."""
    name = _METHODS.get(method.lower(), method)
    shares = ["", ""] if explained is None else [f" ({share:.0%})".replace("%", " %") for share in explained]
    ax.set(xlabel=f"{name} 1{shares[0]}", ylabel=f"{name} 2{shares[1]}")


def _draw_regions(ax: Axes, x: np.ndarray, y: np.ndarray, group: np.ndarray, palette: dict[Any, str]) -> None:
    """Fill the grid with a light shade of each group's colour."""
    light = [tuple(0.82 + 0.18 * part for part in to_rgb(color)) for color in palette.values()]
    rank = np.searchsorted(list(palette), group)
    norm = BoundaryNorm(np.arange(len(light) + 1) - 0.5, len(light))
    look: dict[str, Any] = dict(cmap=ListedColormap(light), norm=norm, shading="nearest", rasterized=True, zorder=0)
    ax.pcolormesh(x, y, rank, **look)
    ax.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()))


def _draw_points(
    ax: Axes, points: np.ndarray, groups: list[int], kinds: list[Any], palette: dict[Any, str]
) -> dict[Any, str]:
    """Scatter the points, one marker after the other, and return the marker of each label, if they have one."""
    names = ordered(kinds)
    markers = dict(zip(names, _LABEL_MARKERS)) if len(names) <= len(_LABEL_MARKERS) else dict.fromkeys(names, "o")
    size = mpl.rcParams["lines.markersize"] ** 2 * float(np.clip(300 / len(points), 0.3, 1))
    shown = np.isfinite(points).all(axis=1)
    for marker in dict.fromkeys(markers.values()):
        rows = [i for i, kind in enumerate(kinds) if markers[kind] == marker and shown[i]]
        colors = [palette[groups[i]] for i in rows]
        look: dict[str, Any] = dict(marker=marker, linewidths=0.3, edgecolors="white", zorder=2)
        ax.scatter(points[rows, 0], points[rows, 1], s=size, c=colors, **look)
    return markers if None not in markers and len(set(markers.values())) == len(markers) else {}


def _draw_centroids(ax: Axes, centroids: np.ndarray) -> None:
    """Mark the centroids by rings, with their numbers inside while those can be told apart."""
    numbered = len(centroids) <= _MOST_NUMBERED
    ring: dict[str, Any] = dict(linestyle="none", markeredgecolor="black", markerfacecolor="white", zorder=4)
    if not numbered:
        ax.plot(centroids[:, 0], centroids[:, 1], "o", markersize=5, **ring)
        return
    size = FontProperties(size="x-small").get_size_in_points()
    text: dict[str, Any] = dict(ha="center", va="center_baseline", size=size, zorder=4, clip_on=True)
    # Each with its number, so that of overlapping ones the last can be read.
    for number, (x, y) in enumerate(centroids):
        if np.isfinite([x, y]).all():
            ax.plot([x], [y], "o", markersize=1.75 * size, **ring)
            ax.text(x, y, str(number), **text)


def _explain(ax: Axes, palette: dict[Any, str], markers: dict[Any, str]) -> None:
    """Explain colours as groups, markers as labels, and the rings."""

    def dot(**look: Any) -> Line2D:
        return Line2D([], [], linestyle="none", **look)

    groups = [dot(color=color, marker="o") for color in palette.values()]
    labels = [dot(color="0.35", marker=marker, label=full_name(name, "label")) for name, marker in markers.items()]
    centroid = dot(marker="o", markerfacecolor="white", markeredgecolor="black", markersize=8, label="centroid")
    show_groups(ax, palette, groups, [*labels, centroid])
