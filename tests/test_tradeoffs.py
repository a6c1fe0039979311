"""Score against size."""

import numpy as np
import pandas as pd
import pytest

from analysis import tradeoffs
from analysis.parameters import LayerShape, count
from tucka import TuckAConfig

RUNS = pd.DataFrame(
    [("lora", 100, 70.0), ("lora", 100, 80.0), ("lora", 200, 80.0), ("tucka", 100, 90.0), ("vera", 50, np.nan)],
    columns=["arm", "size", "test"],
)


def test_runs_are_averaged_and_the_front_is_marked():
    table = tradeoffs.trade_off(RUNS, "arm", "size", "test")
    assert table["method"].tolist() == ["tucka", "lora", "lora"] and table["score"].tolist() == [90, 75, 80]
    assert table["error"][1] == pytest.approx(5) and np.isnan(table["error"][0])
    assert table["seeds"].tolist() == [1, 2, 1] and table["front"].tolist() == [True, False, False]
    assert table["leads"].tolist() == [True, True, True]


def test_the_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    size, score = rng.integers(1, 8, 60), rng.integers(0, 8, 60)
    expected = [
        not any((b <= a and t >= s) and (b < a or t > s) for b, t in zip(size, score)) for a, s in zip(size, score)
    ]
    assert tradeoffs.pareto_front(size, score).tolist() == expected


def test_expert_counts_multiply_groups_and_experts():
    runs = pd.DataFrame({"k": [2, 2, 4], "t": [2, 2, 1], "r": [4, 4, 8], "score": [1.0, 3.0, 5.0]})
    table = tradeoffs.expert_counts(runs)
    assert table["experts"].tolist() == [4] and table["score"].tolist() == [3.0] and table["seeds"].tolist() == [3]
    table = tradeoffs.expert_counts(runs, series="r")
    assert table["series"].tolist() == ["r=4", "r=8"] and table["score"].tolist() == [2.0, 5.0]
    assert tradeoffs.expert_counts(runs.assign(r=[2, 16, 4]), series="r")["series"].tolist() == ["r=2", "r=4", "r=16"]


def test_growth_follows_the_closed_forms():
    table = tradeoffs.parameter_scaling("width", [64, 128], layers=3).set_index(["method", "x"])["parameters"]
    shapes = [LayerShape(f"b.{i}.l", 128, 128) for i in range(3)]
    assert table["lora", 128] == count(shapes, "lora", r=8).total
    config = TuckAConfig(k=2, t=4, p=1)
    table = tradeoffs.parameter_scaling("experts", [4, 8], config=config, layers=3, width=128)
    table = table.set_index(["method", "x"])["parameters"]
    shapes = [LayerShape(f"block.{i}.linear", 128, 128) for i in range(3)]
    assert table["tucka", 8] == count(shapes, "tucka", config=config).total
    assert table["one LoRA per expert", 8] == 8 * table["lora", 8] == 8 * table["lora", 4]


def test_bad_tables_say_what_they_lack():
    with pytest.raises(ValueError, match="runs lack the columns method, parameters, score; they have arm, size, test"):
        tradeoffs.trade_off(RUNS)
    with pytest.raises(ValueError, match="none of 1 runs has a finite test"):
        tradeoffs.trade_off(RUNS[-1:], "arm", "size", "test")
    with pytest.raises(ValueError, match="lack the columns k, t"):
        tradeoffs.expert_counts(RUNS, score="test")
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        tradeoffs.pareto_front([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="against is 'width' or 'experts', got 'depth'"):
        tradeoffs.parameter_scaling("depth", [1])
    with pytest.raises(ValueError, match="6 experts are no multiple of t=4"):
        tradeoffs.parameter_scaling("experts", [6], config=TuckAConfig(t=4))
