"""What the plots draw, read back from their artists: images, groups, layers and the router's map."""

import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import PatchCollection, PathCollection, QuadMesh
from matplotlib.colors import to_hex, to_rgba

from analysis import plots
from analysis.styles import MISSING, PALETTE, group_colors, style

NO_VALUES = "no finite values"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def tick_names(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def bars(ax):
    """Axes of the colour bars, which stand inside those of the plot."""
    return ax.child_axes


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []


def drawn(ax):
    """Render, so that whatever a backend would refuse fails here."""
    ax.figure.draw_without_rendering()
    return ax


def layer_names(count):
    return [f"base_model.model.bert.encoder.layer.{i}.attention.self.query" for i in range(count)]


def routes(rng, k=4, t=2, n=60, **changes):
    grid = np.linspace(-3, 3, 5)
    values = dict(
        points=rng.normal(size=(n, 2)),
        centroids=rng.normal(size=(k * t, 2)),
        groups=np.arange(n) % k,
        method="pca",
        explained=(0.431, 0.172),
        regions=(grid, grid[:4], np.arange(20).reshape(4, 5) % k),
    )
    return SimpleNamespace(**{**values, **changes})


# --- core slices ---------------------------------------------------------------------------------------------------


def test_core_slices_share_one_symmetric_scale(rng):
    slices = rng.normal(size=(4, 2, 3, 3))
    slices[2, 1, 0, 0] = -7.5
    ax = drawn(plots.core_slices(slices))
    assert len(ax.images) == 8
    for image, (i, j) in zip(ax.images, np.ndindex(4, 2)):
        np.testing.assert_array_equal(image.get_array(), slices[i, j])
        assert image.get_clim() == (-7.5, 7.5)
        assert image.norm(0.0) == 0.5
    assert len(bars(ax)) == 1 and bars(ax)[0].get_ylabel() == "entry"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("group", "slice")
    assert tick_names(ax.xaxis) == ["0", "1", "2", "3"] and tick_names(ax.yaxis) == ["0", "1"]


def test_core_slices_stand_in_columns_of_groups_without_overlap(rng):
    ax = plots.core_slices(rng.normal(size=(3, 2, 2, 2)), groups=["maths", "code", "law"], row="expert")
    extents = np.array([image.get_extent() for image in ax.images]).reshape(3, 2, 4)
    assert (extents[:, 0, :2] == extents[:, 1, :2]).all() and (extents[0, :, 2:] == extents[2, :, 2:]).all()
    assert (extents[1:, 0, 0] > extents[:-1, 0, 1]).all()  # the next group begins after the one before
    assert (extents[:, 1, 3] > extents[:, 0, 2]).all() and ax.yaxis_inverted()  # slice 1 is below slice 0
    assert tick_names(ax.xaxis) == ["maths", "code", "law"] and ax.get_ylabel() == "expert"


def test_core_slices_of_many_groups_go_on_in_further_rows(rng):
    with style("paper"):
        ax = drawn(plots.core_slices(rng.normal(size=(64, 2, 2, 2))))
    boxes = {tuple(np.round(image.get_extent(), 6)) for image in ax.images}
    rows = {extent[2:] for extent in boxes}
    assert len(boxes) == 128 and len(rows) > 2
    assert set(texts(ax)) <= set(map(str, range(64))) and {"0", "32"} <= set(texts(ax))
    assert set(tick_names(ax.yaxis)) == {"0", "1"}


def test_core_slices_show_what_is_not_finite_in_grey(rng):
    slices = rng.normal(size=(2, 1, 2, 2))
    slices[0, 0, 0, 0], slices[0, 0, 1, 1], slices[1] = np.inf, 2.0, np.nan
    ax = drawn(plots.core_slices(slices))
    image = ax.images[0]
    assert image.get_clim() == (-2, 2)
    assert to_hex(image.to_rgba(image.get_array())[0, 0]).upper() == MISSING
    assert texts(plots.core_slices(np.full((2, 1, 2, 2), np.nan))) == [NO_VALUES]
    assert plots.core_slices(np.zeros((1, 1, 1, 1))).images[0].get_clim() == (-1, 1)


@given(st.integers(1, 64), st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=8, deadline=None)
def test_core_slices_of_any_size(k, p, r):
    ax = plots.core_slices(np.ones((k, p, r, r)))
    assert len(ax.images) == k * p and len(bars(ax)) == 1
    plt.close(ax.figure)


@pytest.mark.parametrize(
    "slices, groups, message",
    [
        (np.ones((2, 3, 3)), None, r"slices has shape \(K, P, R, R\) and no empty axis, got \(2, 3, 3\)"),
        (np.ones((2, 0, 3, 3)), None, r"no empty axis, got \(2, 0, 3, 3\)"),
        (np.ones((2, 1, 3, 4)), None, "slices are square, got 3×4"),
        (np.ones((2, 1, 3, 3)), ["one"], "each of the K=2 groups of slices, got 1 names"),
        ([[[["a"]]]], None, "slices is numeric, but could not convert"),
    ],
)
def test_core_slices_refuse(slices, groups, message):
    with pytest.raises(ValueError, match=message):
        plots.core_slices(slices, groups=groups)
    assert not plt.get_fignums()


# --- similarity ----------------------------------------------------------------------------------------------------


def test_expert_similarity_is_ordered_by_group(rng):
    matrix = np.clip(rng.normal(size=(6, 6)) / 4, -1, 1)
    groups = np.array([2, 0, 1, 0, 2, 0])
    ax = drawn(plots.expert_similarity(matrix, groups))
    order = [1, 3, 5, 2, 0, 4]
    np.testing.assert_array_equal(ax.images[0].get_array(), matrix[np.ix_(order, order)])
    assert ax.images[0].get_clim() == (-1, 1)
    assert sorted(line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1) == [2.5, 3.5]
    assert sorted(line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1) == [2.5, 3.5]
    assert tick_names(ax.xaxis) == tick_names(ax.yaxis) == ["0", "1", "2"]
    np.testing.assert_allclose(ax.get_xticks(), [1, 3, 4.5])
    assert bars(ax)[0].get_ylim() == (-1, 1) and bars(ax)[0].get_ylabel() == "cosine similarity"


@pytest.mark.parametrize("k, t", [(1, 1), (1, 4), (4, 1), (64, 8)])
def test_expert_similarity_of_any_size(k, t):
    ax = drawn(plots.expert_similarity(np.eye(k * t), np.repeat(np.arange(k), t)))
    assert ax.images[0].get_array().shape == (k * t, k * t)
    assert len(ax.lines) == 2 * (k - 1)
    assert 1 <= len(ax.get_xticks()) <= k


@pytest.mark.parametrize(
    "matrix, groups, message",
    [
        (np.eye(3), [0, 1], r"matrix is \(E, E\) and groups is \(E,\), got \(3, 3\) and \(2,\)"),
        (np.ones((2, 3)), [0, 1], r"got \(2, 3\) and \(2,\)"),
        (np.array([[1, -1.7], [0, 1]]), [0, 1], r"matrix holds cosines in \[-1, 1\], found -1.7"),
        (np.ones(3), [0, 1, 2], r"matrix has shape \(E, E\)"),
    ],
)
def test_expert_similarity_refuses(matrix, groups, message):
    with pytest.raises(ValueError, match=message):
        plots.expert_similarity(matrix, groups)


def similarity_table(layers, groups, rng):
    rows = [(name, group, rng.uniform(-1, 1), rng.uniform(-1, 1)) for name in layers for group in range(groups)]
    return pd.DataFrame(rows, columns=["layer", "group", "within", "across"])


@pytest.mark.parametrize("value", ["within", "across"])
def test_layer_group_similarity_keeps_the_order_of_layers(rng, value):
    layers = layer_names(12)[::-1]
    table = similarity_table(layers, 3, rng)
    ax = drawn(plots.layer_group_similarity(table.sample(frac=1, random_state=1).sort_index(), value=value))
    np.testing.assert_array_equal(ax.images[0].get_array(), table[value].to_numpy().reshape(12, 3))
    assert ax.images[0].get_clim() == (-1, 1) and value in bars(ax)[0].get_ylabel()
    assert tick_names(ax.yaxis)[:2] == ["11.attention.self.query", "10.attention.self.query"] or (
        tick_names(ax.yaxis)[:2] == ["11…self.query", "10…self.query"]
    )
    assert tick_names(ax.xaxis) == ["0", "1", "2"]


def test_layer_group_similarity_writes_values_where_they_fit_and_hatches_gaps(rng):
    table = similarity_table(layer_names(2), 2, rng)
    table.loc[1, "across"] = np.nan
    ax = drawn(plots.layer_group_similarity(table))
    assert texts(ax) == [f"{number:.2f}".replace("-", "−") for number in table["across"].dropna()]
    (hatched,) = (artist for artist in ax.collections if isinstance(artist, PatchCollection))
    (path,) = hatched.get_paths()
    assert hatched.get_hatch() and tuple(path.vertices.mean(axis=0).round()) == (1, 0)
    assert not texts(plots.layer_group_similarity(similarity_table(layer_names(48), 64, rng)))
    assert texts(plots.layer_group_similarity(table.assign(across=np.nan))) == [NO_VALUES]


def test_layer_group_similarity_refuses(rng):
    table = similarity_table(["a", "b"], 2, rng)
    with pytest.raises(ValueError, match="value is one of across, within, got 'both'"):
        plots.layer_group_similarity(table, value="both")
    with pytest.raises(ValueError, match="one row for each layer, group, found several for layer=b, group=1"):
        plots.layer_group_similarity(pd.concat([table, table.tail(1)]))
    with pytest.raises(ValueError, match=r"column 'across' of table holds cosines in \[-1, 1\], found 3"):
        plots.layer_group_similarity(table.assign(across=3.0))


# --- router map ----------------------------------------------------------------------------------------------------


def scatters(ax):
    return [artist for artist in ax.collections if isinstance(artist, PathCollection)]


def test_router_map_colours_points_by_group(rng):
    data = routes(rng)
    ax = drawn(plots.router_map(data))
    (points,) = scatters(ax)
    np.testing.assert_array_equal(points.get_offsets(), data.points)
    np.testing.assert_array_equal(points.get_facecolors(), [to_rgba(PALETTE[group]) for group in data.groups])
    np.testing.assert_array_equal([(*line.get_xdata(), *line.get_ydata()) for line in ax.lines], data.centroids)
    assert texts(ax) == [str(number) for number in range(8)]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("PC 1 (43 %)", "PC 2 (17 %)")
    assert legend(ax) == ["0", "1", "2", "3", "centroid"] and ax.get_legend().get_title().get_text() == "group"


def test_router_map_marks_few_labels_and_not_many(rng):
    data = routes(rng)
    kinds = np.array(["maths", "code", "law"])[np.arange(60) // 20]
    ax = drawn(plots.router_map(data, labels=kinds))
    for part, rows in zip(scatters(ax), (slice(0, 20), slice(20, 40), slice(40, 60))):
        np.testing.assert_array_equal(part.get_offsets(), data.points[rows])
    assert legend(ax)[4:7] == ["maths", "code", "law"]
    assert len({part.get_paths()[0].vertices.shape for part in scatters(ax)}) > 1
    ax = plots.router_map(data, labels=np.arange(60))
    assert len(scatters(ax)) == 1 and legend(ax) == ["0", "1", "2", "3", "centroid"]
    assert "label 1" in legend(plots.router_map(data, labels=np.arange(60) % 2))
    assert "unknown" in legend(plots.router_map(data, labels=np.where(np.arange(60) % 2, 1.0, np.nan)))


@pytest.mark.parametrize("as_object", [False, True])
def test_router_map_fills_the_regions_behind(rng, as_object):
    x, y, group = routes(rng).regions
    regions = SimpleNamespace(x=x, y=y, group=group) if as_object else (x, y, group)
    ax = drawn(plots.router_map(routes(rng, regions=regions)))
    (mesh,) = (artist for artist in ax.collections if isinstance(artist, QuadMesh))
    np.testing.assert_array_equal(np.asarray(mesh.get_array()).reshape(group.shape), group)
    assert mesh.get_zorder() < scatters(ax)[0].get_zorder()
    assert (np.asarray(mesh.get_facecolors())[:, :3].min(axis=1) > 0.6).all()  # light


@pytest.mark.parametrize(
    "method, explained, name", [("tsne", None, "t-SNE 1"), ("umap", None, "UMAP 1"), ("pca", None, "PC 1")]
)
def test_router_map_names_the_projection(rng, method, explained, name):
    ax = plots.router_map(routes(rng, method=method, explained=explained, regions=None))
    assert ax.get_xlabel() == name


@pytest.mark.parametrize("k, t", [(1, 1), (8, 1), (9, 2), (64, 2)])
def test_router_map_explains_many_groups_by_a_colour_bar(rng, k, t):
    ax = drawn(plots.router_map(routes(rng, k=k, t=t, n=2 * k)))
    assert len(bars(ax)) == (k > 8)
    assert len(legend(ax)) == (k + 1 if k <= 8 else 1)
    assert to_hex(scatters(ax)[0].get_facecolors()[k - 1]) == group_colors(k)[-1].lower()


def test_router_map_leaves_out_what_is_not_finite(rng):
    data = routes(rng)
    data.points[3], data.centroids[0] = np.nan, np.inf
    ax = drawn(plots.router_map(data))
    assert len(scatters(ax)[0].get_offsets()) == 59 and texts(ax) == list("1234567")
    nothing = routes(rng, points=np.full((3, 2), np.nan), groups=[0, 1, 2], centroids=np.full((2, 2), np.nan))
    assert texts(plots.router_map(nothing)) == [NO_VALUES]


@pytest.mark.parametrize(
    "changes, labels, message",
    [
        (dict(groups=[0, 1]), None, r"got \(60, 2\), \(8, 2\) and \(2,\)"),
        (dict(points=np.ones((60, 3))), None, r"got \(60, 3\)"),
        (dict(points=np.ones((0, 2)), groups=[]), None, r"points has shape \(N, 2\) and no empty axis"),
        ({}, ["a"], "labels names each of the 60 points, got 1 labels"),
        (dict(regions=(np.arange(3), np.arange(2), np.ones((3, 2)))), None, r"got \(3,\), \(2,\) and \(3, 2\)"),
    ],
)
def test_router_map_refuses(rng, changes, labels, message):
    with pytest.raises(ValueError, match=message):
        plots.router_map(routes(rng, **changes), labels=labels)


# --- all of them ---------------------------------------------------------------------------------------------------


def test_import_chooses_no_backend_and_needs_no_display():
    code = (
        "import sys, analysis.plots as plots; assert 'matplotlib.pyplot' not in sys.modules; "
        "assert all(callable(getattr(plots, name)) for name in plots.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": "", "HOME": "/tmp"})


def test_axes_that_are_given_are_used_and_parameters_left_alone(rng):
    before = dict(plt.rcParams)
    figure, (left, right) = plt.subplots(1, 2)
    assert plots.router_map(routes(rng), ax=left) is left
    assert plots.expert_similarity(np.eye(2), [0, 1], ax=right) is right
    assert plt.get_fignums() == [figure.number] and dict(plt.rcParams) == before
