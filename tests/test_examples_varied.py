"""The examples that vary TuckA's own settings, at reduced size: rank selection and expert scaling."""

import sys
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # examples are not part of what is installed

import expert_scaling
import rank_selection
from common import results

SHORT = ["--samples", "70", "--epochs", "1"]


def places(directory, *options):
    return ["--output", str(directory / "out"), "--results", str(directory / "results.csv"), *SHORT, *options]


@pytest.fixture
def no_more_runs(monkeypatch):
    """A function after whose call a run that is not in the table fails."""

    def fail(*args, **kwargs):
        raise AssertionError("a run that is in the table is not repeated")

    return lambda: monkeypatch.setattr("common.study.run", fail)


def test_ranks_are_uniform_suggested_and_truncated(tmp_path, no_more_runs, capsys):
    options = places(tmp_path, "--ranks", "1", "2", "--method", "tucka", "lora")
    means = rank_selection.main(options).set_index(["ranks", "budget"])
    small, large = sorted(set(means.index.get_level_values("budget")))
    uniform = means.loc[rank_selection.UNIFORM, "parameters"]
    assert list(uniform) == [small, large]
    suggested = means.loc[rank_selection.SUGGESTED, "parameters"]
    assert (suggested <= suggested.index).all() and (suggested > 0.8 * suggested.index).all()
    for how in (rank_selection.TRUNCATED, rank_selection.RECOVERED):
        assert list(means.loc[how].index) == [small] and means.loc[(how, small), "parameters"] <= small
    lora = means.loc["lora"]
    assert list(lora.index) == [small, large] and (lora["parameters"] >= lora.index).all()
    assert "gradient tensor; effective rank by mode" in capsys.readouterr().out
    assert imread(tmp_path / "out" / "ranks.png").shape[1] > 1000
    rows = results.runs(tmp_path / "results.csv", "rank_selection")
    assert (rows["method"] == "tucka").sum() == 6 and set(rows["method"]) == {"tucka", "lora"}
    no_more_runs()
    pd.testing.assert_frame_equal(rank_selection.main(options).set_index(["ranks", "budget"]), means)


def test_experts_are_swept_and_drawn(tmp_path, no_more_runs, capsys):
    options = places(tmp_path, "--k", "1", "3", "--t", "2", "--seed", "0", "--jobs", "1", "--method", "tucka", "lora")
    whole = expert_scaling.main(options)
    beside = whole[whole["series"] == "lora"]
    runs = whole[whole["series"] == "t=2"]
    assert len(whole) == 4 and (beside["parameters"].to_numpy() >= runs["parameters"].to_numpy()).all()
    assert list(zip(runs["k"], runs["t"], runs["p"], runs["experts"])) == [(1, 2, 2, 2), (3, 2, 2, 6)]
    assert runs["error"].eq("").all() and runs["samples"].eq(70).all() and runs["parameters"].is_monotonic_increasing
    assert "t=2: no law, a power law with a floor needs scores of at least 3 sizes, got 2" in capsys.readouterr().out
    assert imread(tmp_path / "out" / "scaling.png").shape[1] > 1000
    assert sorted(results.runs(tmp_path / "results.csv", "expert_scaling")["method"])[-2:] == ["tucka", "tucka"]
    no_more_runs()
    (tmp_path / "out" / "runs.csv").unlink()  # the rows of the common table are enough
    again = expert_scaling.main(options)
    pd.testing.assert_series_equal(again["score"], whole["score"])


def test_laws_are_fitted_for_every_t(tmp_path, capsys):
    lines = [
        {"k": k, "t": t, "experts": k * t, "parameters": 1000 * k * t, "score": 90 - 40 / (k * t), "seed": seed}
        for k in (1, 2, 4, 8)
        for t in (1, 2)
        for seed in (0, 1)
    ]
    runs = expert_scaling.named(pd.DataFrame(lines).assign(method="tucka"))
    laws = expert_scaling.fitted(runs)
    assert {name: (round(law.b, 2), round(100 - law.c, 1)) for name, law in laws.items()} == {
        "t=1": (1.0, 90.0), "t=2": (1.0, 90.0),
    }  # fmt: skip
    assert "t=1: b = 1.00 (1.00 to 1.00), approaching 90.0" in capsys.readouterr().out
    sizes = pd.DataFrame({"method": ["TuckA", "TuckA"], "x": [1, 8], "parameters": [1000, 8000]})
    expert_scaling.draw(runs, laws, sizes, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").exists()


def test_what_is_varied_is_no_option(capsys):
    with pytest.raises(SystemExit):
        rank_selection.main(["--r", "4"])
    assert "--r is not an option here: what is varied are settings of TuckA" in capsys.readouterr().err
