"""The parameters that `analysis.styles.style` sets for a block, and the colours."""

import colorsys
from itertools import pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from analysis.styles import DIVERGING, MISSING, PALETTE, WIDTHS, group_colors, style

KINDS = ["paper", "notebook", "slides"]
GOLDEN = (1 + 5**0.5) / 2


def lightness(color):
    """CIE L* of an sRGB colour."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(color)]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


@pytest.mark.parametrize("kind", KINDS)
def test_a_style_lasts_for_its_block(kind):
    before = dict(mpl.rcParams)
    with style(kind):
        assert dict(mpl.rcParams) != before
        assert mpl.rcParams["pdf.fonttype"] == mpl.rcParams["ps.fonttype"] == 42
        assert mpl.rcParams["svg.fonttype"] == "none"
        assert mpl.rcParams["figure.constrained_layout.use"]
        assert mpl.rcParams["savefig.dpi"] == 300
        assert tuple(mpl.rcParams["axes.prop_cycle"].by_key()["color"]) == PALETTE
    assert dict(mpl.rcParams) == before


def test_a_style_is_undone_after_an_error():
    before = dict(mpl.rcParams)
    with pytest.raises(RuntimeError, match="inside"), style("slides"):
        raise RuntimeError("inside")
    assert dict(mpl.rcParams) == before


def test_kinds_differ_in_format_and_fonts():
    found = {}
    for kind in KINDS:
        with style(kind):
            found[kind] = mpl.rcParams["savefig.format"], mpl.rcParams["font.size"], mpl.rcParams["lines.linewidth"]
    assert [found[kind][0] for kind in KINDS] == ["pdf", "svg", "svg"]
    assert found["paper"][1:] < found["notebook"][1:] < found["slides"][1:]


@pytest.mark.parametrize("width", WIDTHS)
def test_figures_take_the_width_of_the_venue(width):
    with style("paper", width=width):
        figure_width, height = plt.figure().get_size_inches()
    assert figure_width == WIDTHS[width]
    assert height == pytest.approx(figure_width / GOLDEN, abs=0.006)


def test_a_kind_has_a_width_of_its_own():
    widths = []
    for kind in KINDS:
        with style(kind):
            widths.append(mpl.rcParams["figure.figsize"][0])
    assert widths == [WIDTHS["neurips"], WIDTHS["notebook"], WIDTHS["slide"]]


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="kind is one of paper, notebook, slides, got 'poster'"):
        style("poster")
    with pytest.raises(ValueError, match=r"width is one of neurips, .*aaai-column.*, got 'wide'"):
        style("paper", width="wide")


@pytest.mark.parametrize("kind, start", [("paper", b"%PDF"), ("notebook", b"<?xml")])
def test_files_are_vectors_with_their_text(tmp_path, kind, start):
    with style(kind):
        figure = plt.figure()
        figure.text(0.5, 0.5, "legible")
        figure.savefig(tmp_path / "figure")
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    assert content.startswith(start)
    assert b">legible<" in content if kind == "notebook" else b"/FontFile2" in content


def test_neighbouring_colours_differ_in_grey():
    grey = [lightness(color) for color in PALETTE]
    assert min(abs(a - b) for a, b in pairwise(grey)) > 11
    assert min(abs(a - b) for i, a in enumerate(grey[:4]) for b in grey[:i]) > 11
    assert len(set(PALETTE)) == 8


@given(st.integers(1, 64))
def test_every_group_has_its_own_colour(count):
    colors = group_colors(count)
    assert len(colors) == count == len(set(colors))
    if count <= 8:
        assert colors == list(PALETTE[:count])
    else:
        grey = [lightness(color) for color in colors]
        assert grey == sorted(grey)


def test_colours_need_a_group():
    with pytest.raises(ValueError, match="1 group or more, got 0"):
        group_colors(0)


def test_the_diverging_scale_is_white_between_two_hues_and_never_grey():
    scale = mpl.colormaps[DIVERGING]
    low, middle, high = (colorsys.rgb_to_hsv(*scale(share)[:3]) for share in (0.05, 0.5, 0.95))
    assert middle[1] < 0.03 and middle[2] > 0.95
    assert abs(low[0] - high[0]) > 0.2
    distances = np.abs(scale(np.linspace(0, 1, 256))[:, :3] - np.array(to_rgb(MISSING))).max(axis=1)
    assert distances.min() > 0.1
