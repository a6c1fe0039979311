"""What the flow from labels to groups draws, read back from its artists."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.patches import PathPatch, Rectangle
from test_plots import NO_VALUES, drawn, texts

from analysis import plots
from analysis.styles import PALETTE, style


def bands(ax):
    return [patch for patch in ax.patches if isinstance(patch, PathPatch)]


def flow_bars(ax):
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


def test_label_group_flow_draws_bands_as_high_as_their_shares():
    table = pd.DataFrame([[30, 10], [0, 60]], index=["maths", "law"], columns=[0, 1])
    ax = drawn(plots.label_group_flow(table))
    found = [(band.get_path().vertices[-2] - band.get_path().vertices[0])[1] for band in bands(ax)]
    np.testing.assert_allclose(found, [0.3, 0.1, 0.6])
    assert [band.get_facecolor() for band in bands(ax)] == [to_rgba(PALETTE[i], 0.55) for i in (0, 1, 1)]
    np.testing.assert_allclose([bar.get_height() for bar in flow_bars(ax)], [0.4, 0.6, 0.3, 0.7])
    assert sorted(texts(ax)) == ["group 0  30 %", "group 1  70 %", "law  60 %", "maths  40 %"]
    assert {text.get_ha() for text in ax.texts if "group" in text.get_text()} == {"left"}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_label_group_flow_fills_its_bars(labels, groups, seed):
    counts = np.random.default_rng(seed).integers(0, 9, size=(labels, groups))
    counts[0, 0] += 1
    ax = plots.label_group_flow(pd.DataFrame(counts))
    heights = np.array([bar.get_height() for bar in flow_bars(ax)])
    np.testing.assert_allclose(heights[:labels], counts.sum(axis=1) / counts.sum())
    np.testing.assert_allclose(heights[labels:], counts.sum(axis=0) / counts.sum())
    tops = np.array([bar.get_y() for bar in flow_bars(ax)])
    assert (tops[1:labels] >= (tops + heights)[: labels - 1]).all()  # bars do not overlap
    low, high = sorted(ax.get_ylim())
    assert low <= tops.min() + 1e-9 and (tops + heights).max() <= high + 1e-9
    assert len(bands(ax)) == (counts > 0).sum()
    plt.close(ax.figure)


def test_label_group_flow_keeps_names_apart():
    with style("paper", width="aaai-column"):
        ax = drawn(plots.label_group_flow(pd.DataFrame(np.eye(64) + 1)))
    for side in ("left", "right"):
        places = sorted(text.get_window_extent().bounds[1::2] for text in ax.texts if text.get_ha() == side)
        assert len(places) > 5
        assert all(low + 0.75 * height <= above for (low, height), (above, _) in pairwise(places))


def test_label_group_flow_without_samples_and_of_no_table():
    counts = pd.DataFrame([[1.0, np.nan], [np.inf, 3.0]])
    assert len(bands(plots.label_group_flow(counts))) == 2
    assert texts(plots.label_group_flow(counts * np.nan)) == [NO_VALUES]
    assert texts(plots.label_group_flow(pd.DataFrame([[0, 0]]))) == ["no samples"]
    assert "<1 %" in " ".join(texts(plots.label_group_flow(pd.DataFrame([[1, 999]]))))
    with pytest.raises(ValueError, match="counts are 0 or more, found -2"):
        plots.label_group_flow(pd.DataFrame([[1, -2]]))
    with pytest.raises(ValueError, match=r"a DataFrame of counts .*, got \(0, 0\)"):
        plots.label_group_flow(pd.DataFrame())
    with pytest.raises(ValueError, match="table is numeric, but"):
        plots.label_group_flow(pd.DataFrame([["many"]]))
