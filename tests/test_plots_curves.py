"""What the plots of curves draw, read back from their artists."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from test_plots import NO_VALUES, bars, drawn, layer_names, legend, texts, tick_names

from analysis import plots
from analysis.styles import PALETTE, group_colors, style


def spectra_table(layers, size=6, modes=("input", "group")):
    rows = [
        (name, mode, index, 3.0 * (depth + 2.0) ** -(index - 1), 1.0)
        for depth, name in enumerate(layers)
        for mode in modes
        for index in range(1, size + 1)
    ]
    return pd.DataFrame(rows, columns=["layer", "mode", "index", "value", "energy"])


def history_table(k, steps=5):
    rows = [(10 * step, group, (group + 1) / (k * (k + 1) / 2)) for step in range(steps) for group in range(k)]
    return pd.DataFrame(rows, columns=["step", "group", "share"])


def movement_table(layers, k, t=3):
    rows = [
        (name, group, group * t + expert, 0.01 * (depth + 1) * (group + 1) + 0.001 * expert)
        for depth, name in enumerate(layers)
        for group in range(k)
        for expert in range(t)
    ]
    return pd.DataFrame(rows, columns=["layer", "group", "expert", "movement"])


TRADE = pd.DataFrame(
    {
        "method": ["LoRA", "LoRA", "VeRA", "TuckA", "TuckA"],
        "parameters": [40_000, 20_000, 3_000, 10_000, 90_000],
        "score": [81.0, 80.0, 70.0, 82.0, 85.0],
        "error": [0.5, 0.4, 0.3, np.nan, 0.2],
        "seeds": [5, 5, 5, 3, 5],
        "front": [False, False, True, True, True],
    }
)
EXPERTS = pd.DataFrame(
    {
        "experts": [1, 4, 16, 1, 4],
        "score": [70.0, 75.0, 77.0, 72.0, 78.0],
        "error": [1.0, 1.0, 0.5, np.nan, np.nan],
        "series": ["r=4"] * 3 + ["r=8"] * 2,
    }
)
SCALING = pd.DataFrame(
    {"method": ["VeRA", "VeRA", "LoRA", "LoRA"], "x": [1024, 256, 256, 1024], "parameters": [1032, 264, 4096, 16384]}
)
TABLES = {
    "spectrum": spectra_table(["a.q", "b.q"]),
    "load_over_time": history_table(3),
    "activation_movement": movement_table(["a.q", "b.q"], 2),
    "trade_off": TRADE,
    "expert_scaling": EXPERTS,
    "parameter_scaling": SCALING,
    "layer_group_similarity": pd.DataFrame({"layer": ["a"], "group": [0], "within": [0.5], "across": [0.1]}),
}
VALUES = {
    "spectrum": "value",
    "load_over_time": "share",
    "activation_movement": "movement",
    "trade_off": "score",
    "expert_scaling": "score",
    "parameter_scaling": "parameters",
    "layer_group_similarity": "across",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_do_not_fit_are_refused_with_what_was_found(name):
    plot, table, column = getattr(plots, name), TABLES[name], VALUES[name]
    missing = rf"has columns .*, but {column} not among those found: .*{table.columns[0]}"
    with pytest.raises(ValueError, match=missing):
        plot(table.drop(columns=column))
    with pytest.raises(ValueError, match="at least one row, found none"):
        plot(table.head(0))
    with pytest.raises(ValueError, match=r"is a DataFrame with columns .*, got dict"):
        plot({})
    with pytest.raises(ValueError, match=f"column '{column}' of .* is numeric, but"):
        plot(table.assign(**{column: "much"}))
    key = {"trade_off": "method", "expert_scaling": "series", "parameter_scaling": "method"}.get(name, table.columns[0])
    if name != "load_over_time":
        with pytest.raises(
            ValueError, match=f"column '{key}' of .* is filled, found {len(table)} of {len(table)} rows"
        ):
            plot(table.assign(**{key: None}))
    assert not plt.get_fignums()


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("value", [np.nan, np.inf, None])
def test_data_without_a_finite_number_are_said_so(name, value):
    table = TABLES[name].astype({VALUES[name]: object})
    table[VALUES[name]] = value
    ax = drawn(getattr(plots, name)(table))
    assert texts(ax) == [NO_VALUES] and ax.get_xlabel()


@pytest.mark.parametrize("name", TABLES)
def test_one_missing_number_is_no_reason_to_fail(name):
    table = TABLES[name].astype({VALUES[name]: float})
    table.loc[0, VALUES[name]] = np.nan
    assert getattr(plots, name)(table) is not None
    assert TABLES[name][VALUES[name]].notna().all()


# --- spectrum ------------------------------------------------------------------------------------------------------


def test_spectrum_is_relative_to_the_first_value():
    layers = layer_names(2)
    ax = drawn(plots.spectrum(spectra_table(layers).sample(frac=1, random_state=0).sort_values("layer"), chosen=3))
    first, second, chosen = ax.lines
    np.testing.assert_array_equal(first.get_xdata(), range(1, 7))
    np.testing.assert_allclose(first.get_ydata(), 2.0 ** -np.arange(6))
    np.testing.assert_allclose(second.get_ydata(), 3.0 ** -np.arange(6))
    assert set(chosen.get_xdata()) == {3}
    assert legend(ax) == ["0.attention.self.query", "1.attention.self.query", "chosen rank 3"] or "…" in legend(ax)[0]
    assert ax.get_yscale() == "log" and ax.get_xlim()[0] >= 0.5 and "input" in ax.get_xlabel()


def test_spectrum_marks_a_rank_for_each_layer():
    layers = layer_names(2)
    ax = drawn(plots.spectrum(spectra_table(layers), mode="group", chosen={layers[0]: 2, layers[1]: 4}))
    stars = [line for line in ax.lines if line.get_linestyle() == "None"]
    assert [tuple(line.get_xdata()) for line in stars] == [(2,), (4,)]
    np.testing.assert_allclose([*stars[0].get_ydata(), *stars[1].get_ydata()], [1 / 2, 3.0**-3])
    assert legend(ax)[-1] == "chosen rank" and "group" in ax.get_xlabel()


@pytest.mark.parametrize("count, size", [(1, 1), (8, 4), (9, 4), (48, 32)])
def test_spectrum_of_many_layers_has_a_colour_bar(count, size):
    ax = drawn(plots.spectrum(spectra_table(layer_names(count), size), chosen=1))
    assert len(bars(ax)) == (count > 8) and len(legend(ax)) == (count + 1 if count <= 8 else 1)
    assert [to_hex(line.get_color()) for line in ax.lines[:count]] == [color.lower() for color in group_colors(count)]
    assert len({line.get_marker() for line in ax.lines[:count]}) == (count if count <= 8 else 1)


def test_spectrum_leaves_out_what_a_logarithm_cannot_show():
    table = pd.DataFrame({"layer": "a", "mode": "input", "index": [1, 2, 3], "value": [2.0, 1e-30, 0.0]})
    ax = drawn(plots.spectrum(table))
    assert np.isnan(ax.lines[0].get_ydata()[2]) and ax.get_ylim()[0] >= 1e-8
    assert texts(plots.spectrum(table.assign(value=0.0))) == [NO_VALUES]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(mode="output"), r"mode is one of those in the table \(input, group\), got 'output'"),
        (dict(chosen=0), "chosen ranks are 1 or more, found 0"),
        (dict(chosen={"c": 2}), "chosen names layers of the table, found c"),
    ],
)
def test_spectrum_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        plots.spectrum(TABLES["spectrum"], **changes)


# --- load and movement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 8, 9, 64])
def test_load_over_time_shows_every_group_and_even_loads(k):
    history = history_table(k)
    ax = drawn(plots.load_over_time(history.sample(frac=1, random_state=0)))
    assert len(ax.lines) == k + 1
    for group, line in enumerate(ax.lines[:k]):
        np.testing.assert_array_equal(line.get_xdata(), [0, 10, 20, 30, 40])
        np.testing.assert_array_equal(line.get_ydata(), history.loc[history["group"] == group, "share"])
        assert to_hex(line.get_color()) == group_colors(k)[group].lower()
    ideal = ax.lines[-1]
    assert set(ideal.get_ydata()) == {1 / k} and ideal.get_linestyle() == "--"
    assert legend(ax)[-1] == f"even: 1/{k}" and len(legend(ax)) == (k + 1 if k <= 8 else 1)
    assert len(bars(ax)) == (k > 8)
    assert ax.get_ylim()[0] == 0 and all(name.endswith(" %") for name in tick_names(ax.yaxis))
    assert ax.get_xlabel() == "training step"


def test_load_over_time_of_one_step_has_a_mark_for_each_group():
    ax = drawn(plots.load_over_time(history_table(4, steps=1)))
    assert all(line.get_marker() != "None" for line in ax.lines[:4])


def test_load_over_time_refuses():
    with pytest.raises(ValueError, match=r"one row for each step, group, found several for step=0.*, group=0"):
        plots.load_over_time(pd.concat([history_table(2), history_table(2)]))
    with pytest.raises(ValueError, match=r"column 'share' of history lies in \[0, 1\], found 25"):
        plots.load_over_time(history_table(2).assign(share=25.0))


def test_groups_keep_their_colours_when_others_are_absent():
    history = history_table(4)
    ax = plots.load_over_time(history[history["group"] == 2])
    assert to_hex(ax.lines[0].get_color()) == PALETTE[2].lower() and legend(ax)[0] == "2"


@pytest.mark.parametrize("layers, k", [(1, 1), (2, 4), (12, 8), (48, 4), (48, 64)])
def test_activation_movement_shows_mean_and_range(layers, k):
    table = movement_table(layer_names(layers)[::-1], k)
    ax = drawn(plots.activation_movement(table))
    mean = table.groupby(["group", "layer"], sort=False)["movement"].mean().unstack(sort=False).to_numpy()
    for group in range(k):
        np.testing.assert_allclose(ax.lines[group].get_ydata(), mean[group])
        np.testing.assert_allclose(ax.lines[group].get_xdata(), np.arange(layers), atol=0.31)
    ranges = [artist for artist in ax.collections if isinstance(artist, LineCollection)]
    assert len(ax.collections) == (k if k <= 8 else 0) and len(ranges) == (k if layers <= 12 else 0)
    if ranges:
        lows, highs = np.array(ranges[-1].get_segments())[:, :, 1].T
        np.testing.assert_allclose(highs - lows, 0.002)
    assert len(bars(ax)) == (k > 8) and len(legend(ax)) == (k + 1 if k <= 8 else 0)
    assert all(name.endswith(" %") for name in tick_names(ax.yaxis)) and ax.get_ylim()[0] == 0
    assert tick_names(ax.xaxis)[0].startswith(str(layers - 1) if layers > 1 else "0")


def test_activation_movement_refuses():
    with pytest.raises(ValueError, match="column 'movement' of table is 0 or more, found -1"):
        plots.activation_movement(movement_table(["a"], 1).assign(movement=-1.0))


# --- trade-off and scaling -----------------------------------------------------------------------------------------


def test_trade_off_draws_methods_bands_and_the_front():
    ax = drawn(plots.trade_off(TRADE))
    by_name = {container.get_label(): container for container in ax.containers}
    assert list(by_name) == ["LoRA (n = 5)", "VeRA (n = 5)", "TuckA (n = 3–5)"]
    lora = by_name["LoRA (n = 5)"][0]
    np.testing.assert_array_equal(lora.get_xydata(), [[20_000, 80], [40_000, 81]])
    band = ax.collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose([band.y0, band.y1], [79.6, 81.5])
    (bar,) = by_name["VeRA (n = 5)"][2]
    np.testing.assert_allclose(bar.get_segments()[0], [[3_000, 69.7], [3_000, 70.3]])
    front = next(line for line in ax.lines if line.get_label() == "Pareto front")
    np.testing.assert_array_equal(front.get_xydata(), [[3_000, 70], [10_000, 82], [90_000, 85]])
    assert front.get_drawstyle() == "steps-post" and legend(ax)[-1] == "Pareto front"
    assert ax.get_xscale() == "log" and {"3k", "10k"} & set(tick_names(ax.xaxis))
    assert len({(c[0].get_color(), c[0].get_marker()) for c in ax.containers}) == 3


def test_settings_that_do_not_lead_their_method_are_marks_beside_its_curve():
    leads = np.arange(len(TRADE)) != 1
    others = TRADE.loc[~leads, ["parameters", "score"]].to_numpy()
    ax = drawn(plots.trade_off(TRADE.assign(leads=leads)))
    lora = next(c for c in ax.containers if c.get_label().startswith("LoRA"))[0]
    assert len(lora.get_xydata()) == 1
    faint = [line for line in ax.lines if line.get_alpha() is not None and line.get_linestyle() == "None"]
    assert [line.get_xydata().tolist() for line in faint] == [[[float(x), float(y)] for x, y in others]]
    assert faint[0].get_color() == lora.get_color()


def test_trade_off_of_one_point_and_of_one_number_of_seeds():
    ax = drawn(plots.trade_off(TRADE.head(1)))
    assert legend(ax) == ["LoRA"] and ax.get_ylabel() == "score (mean ± 1 s.e., n = 5)"
    ax = drawn(plots.trade_off(TRADE.assign(seeds=np.nan, error=np.nan)))
    assert legend(ax)[0] == "LoRA" and ax.get_ylabel() == "score (mean ± 1 s.e.)" and len(ax.collections) == 0
    extended = plots.trade_off(TRADE.assign(front=[False, False, True, True, False])).lines[-1]
    np.testing.assert_array_equal(extended.get_xydata()[-1], [90_000, 82])  # the front reaches the largest size
    with pytest.raises(ValueError, match="column 'parameters' of table is positive, found 0"):
        plots.trade_off(TRADE.assign(parameters=0))


def test_expert_scaling_has_powers_of_two_and_bands():
    ax = drawn(plots.expert_scaling(EXPERTS))
    assert legend(ax) == ["r=4", "r=8"] and ax.get_xlabel() == "experts K·T"
    np.testing.assert_array_equal(ax.containers[0][0].get_xydata(), [[1, 70], [4, 75], [16, 77]])
    band = ax.collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose([band.x0, band.x1, band.y0, band.y1], [1, 16, 69, 77.5])
    assert len(ax.collections) == 1  # the second series has no errors
    assert tick_names(ax.xaxis) == ["1", "4", "16"] and ax.xaxis.get_transform().base == 2
    one = drawn(plots.expert_scaling(EXPERTS.head(3).drop(columns="series")))
    assert one.get_legend() is None and len(one.containers) == 1
    with pytest.raises(ValueError, match="one row for each experts, found several for experts=1"):
        plots.expert_scaling(EXPERTS.drop(columns="series"))


@pytest.mark.parametrize("against, label", [("width", "layer width D (features)"), ("experts", "experts K·T")])
def test_parameter_scaling_is_doubly_logarithmic(against, label):
    ax = drawn(plots.parameter_scaling(SCALING, against=against))
    assert ax.get_xlabel() == label and ax.get_xscale() == ax.get_yscale() == "log"
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[256, 264], [1024, 1032]])
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), [[256, 4096], [1024, 16384]])
    assert legend(ax) == ["LoRA", "VeRA"]  # as the lines end, from above
    assert tick_names(ax.xaxis) == ["256", "1024"]
    with pytest.raises(ValueError, match="against is one of width, experts, got 'depth'"):
        plots.parameter_scaling(SCALING, against="depth")
    with pytest.raises(ValueError, match="column 'x' of table is positive, found -1"):
        plots.parameter_scaling(SCALING.assign(x=[-1, 2, 3, 4]))


def test_parameter_scaling_prefers_powers_of_two_where_widths_are_close():
    widths = [256, 512, 768, 1024, 2048, 4096, 8192]
    table = pd.DataFrame({"method": "LoRA", "x": widths, "parameters": widths})
    with style("paper"):
        ax = drawn(plots.parameter_scaling(table))
    assert tick_names(ax.xaxis) == ["256", "512", "1024", "2048", "4096", "8192"]


@pytest.mark.parametrize("low, high", [(1_000, 1_200), (1_000, 90_000), (100, 5e9), (7, 7)])
def test_engineering_axes_have_legible_ticks(low, high):
    table = pd.DataFrame({"method": ["a", "b"], "x": [8, 16], "parameters": [low, high]})
    with style("paper", width="acl-column"):
        ax = drawn(plots.parameter_scaling(table))
        names = [name for name in tick_names(ax.yaxis) if name]
    assert names and len(set(names)) == len(names) and all("\N{MULTIPLICATION SIGN}" not in name for name in names)
