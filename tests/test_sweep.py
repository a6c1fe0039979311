"""Sweeps: grids, and tables that survive."""

import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch
from sweep_bench import run

from analysis import sweep
from analysis.sweeps import expand, plan
from analysis.sweeps.store import Table
from analysis.sweeps.work import checked, text

GRID = {"r": [2, 4], "k": [1, 3]}


class Counted:
    """An objective that remembers its calls."""

    def __init__(self, fails=()):
        self.calls, self.fails = [], fails

    def __call__(self, settings, seed):
        self.calls.append((settings["r"], settings["k"], seed))
        if settings["r"] in self.fails:
            raise RuntimeError("out of\nmemory")
        return {"score": settings["r"] * settings["k"] + seed, "parameters": 8 * settings["r"]}


# Grids


def test_every_combination_is_a_run_of_every_seed():
    runs = expand({"r": np.array([2, 4]), "form": ("a", None)}, seeds=range(2))
    assert [(*run.settings.values(), run.seed) for run in runs] == [
        (r, form, seed) for seed in (0, 1) for r in (2, 4) for form in ("a", None)
    ]
    assert type(runs[0].settings["r"]) is int and str(runs[1]) == "r=2, form=null, seed=0"


def test_dependent_settings_are_several_grids():
    runs = expand([{"method": ["lora"], "r": [1, 2]}, {"method": ["tucka"], "r": [1], "k": [2]}])
    assert [run.settings for run in runs] == [
        {"method": "lora", "r": 1},
        {"method": "lora", "r": 2},
        {"method": "tucka", "r": 1, "k": 2},
    ]


@pytest.mark.parametrize(
    ("grid", "seeds", "message"),
    [
        ({}, [0], "the grid is empty"),
        ([], [0], "the grid is empty"),
        ([{"r": [1]}, {}], [0], "a part of the grid is empty"),
        ("r=1", [0], "a grid is a mapping"),
        ([1], [0], "a grid is a mapping"),
        ({"r": []}, [0], "'r' has no values"),
        ({"r": 8}, [0], "values of 'r' are a list, got 8"),
        ({"r": "88"}, [0], "values of 'r' are a list, got '88'"),
        ({"r": [1, 2, 1]}, [0], "'r' has the value 1 twice$"),
        ({"r": [1, 1.0]}, [0], r"value 1 twice \(as 1 and as 1.0\)"),
        ({"r": [True, "true"]}, [0], "value true twice"),
        ({"r": [float("nan")]}, [0], "finite and not empty"),
        ({"r": [[1, float("inf")]]}, [0], "finite and not empty"),
        ({"r": [""]}, [0], "finite and not empty"),
        ({"r": [object()]}, [0], "what JSON can hold"),
        ({"seed": [1]}, [0], "no setting may be called 'seed'"),
        ({"score": [1]}, [0], "no setting may be called 'score'"),
        ({1: [1]}, [0], "names of one line, got 1"),
        ({"a\nb": [1]}, [0], "names of one line"),
        ({"r": [1]}, [], "at least one, got none"),
        ({"r": [1]}, [0, 1, 0], "seed 0 occurs twice"),
        ({"r": [1]}, [0.5], "whole numbers, at least one, got 0.5"),
        ({"r": [1]}, [True], "got True"),
        ({"r": [1]}, 3, "seeds are a list of whole numbers, got 3"),
        ({"r": [1]}, "01", "seeds are a list"),
        ([{"r": [1, 2]}, {"r": [2, 3]}], [0], "two parts of the grid hold the same run: r=2, seed=0"),
        ({name: range(1000) for name in "abc"}, [0], "1000000000 runs, more than"),
    ],
)
def test_grids_that_cannot_be_are_refused_before_anything_runs(grid, seeds, message, out):
    objective = Counted()
    with pytest.raises(ValueError, match=message):
        sweep(objective, grid, seeds, out=out)
    assert not objective.calls and not out.exists()


def test_a_combination_that_the_check_refuses_stops_the_sweep(out):
    def check(settings):
        if settings["r"] * settings["k"] > 6:
            raise ValueError("too large")

    objective = Counted()
    with pytest.raises(ValueError, match="the combination r=4, k=3 cannot be: too large"):
        sweep(objective, GRID, out=out, check=check)
    assert not objective.calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "slurm"}, "backends are loky, threading, dask, ray, got 'slurm'"),
        ({"n_jobs": 0}, "n_jobs is a number of runs at a time"),
        ({"n_jobs": True}, "n_jobs is a number"),
        ({"address": "tcp://a:1"}, "has no address"),
    ],
)
def test_bad_options_are_refused(options, message, out):
    with pytest.raises(ValueError, match=message):
        sweep(Counted(), GRID, out=out, **options)


def test_the_objective_is_a_function_or_a_script(tmp_path, out):
    with pytest.raises(ValueError, match="there is no script"):
        sweep(tmp_path / "none.py", GRID, out=out)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"neither Python \(.py\) nor executable"):
        sweep(tmp_path / "notes.txt", GRID, out=out)
    with pytest.raises(ValueError, match="a function or the path of a script, got 3"):
        sweep(3, GRID, out=out)


# The table


def test_a_sweep_gives_a_row_for_each_run_and_a_repeated_one_costs_nothing(out):
    objective = Counted()
    table = run(objective, GRID, seeds=[0, 5], out=out)
    assert len(objective.calls) == 8 and len(set(objective.calls)) == 8
    assert table[["r", "k", "seed", "score"]].to_numpy().tolist() == [
        [r, k, seed, r * k + seed] for seed in (0, 5) for r in (2, 4) for k in (1, 3)
    ]
    assert (table["parameters"] == 8 * table["r"]).all() and (table["error"] == "").all()
    assert list(pd.read_csv(out).columns) == ["objective", "r", "k", "seed", "score", "parameters", "seconds", "error"]
    before = out.read_bytes()
    pd.testing.assert_frame_equal(run(objective, GRID, seeds=[0, 5], out=out), table)
    assert len(objective.calls) == 8 and out.read_bytes() == before


def test_a_grid_may_grow_and_its_settings_change_places(out):
    objective = Counted()
    run(objective, GRID, out=out)
    table = run(objective, {"k": [3, 5], "r": [4.0]}, out=out)
    assert objective.calls[4:] == [(4.0, 5, 0)] and table["score"].tolist() == [12, 20]
    assert len(pd.read_csv(out)) == 5


def test_failures_are_rows_and_are_repeated_on_demand(out):
    with pytest.warns(
        UserWarning, match=r"2 of 4 runs failed, the first \(r=4, k=1, seed=0\) with RuntimeError: out of"
    ):
        table = sweep(Counted(fails=[4]), GRID, out=out, progress=False)
    assert table["error"].tolist() == ["", "", *["RuntimeError: out of memory"] * 2]
    assert np.isnan(table["score"]).tolist() == [False, False, True, True]
    objective = Counted()
    with pytest.warns(UserWarning, match="2 of 4 runs failed"):
        sweep(objective, GRID, out=out, progress=False)
    assert not objective.calls, "known failures cost nothing either"
    table = run(objective, GRID, out=out, retry_failed=True)
    assert [call[0] for call in objective.calls] == [4, 4] and table["score"].tolist() == [2, 6, 4, 12]


def test_a_table_whose_first_runs_failed_gets_the_columns_of_later_results(out):
    def objective(settings, seed):
        if settings["r"] == 1:
            raise SystemExit("no such rank")
        return {"score": 1.0, **({"nmi": 0.5} if settings["r"] > 2 else {}), "note": "a, b", "good": settings["r"] > 2}

    with pytest.warns(UserWarning, match="SystemExit: no such rank"):
        table = sweep(objective, {"r": [1, 2, 3]}, out=out, progress=False)
    assert list(table) == ["objective", "r", "seed", "score", "note", "good", "nmi", "seconds", "error"]
    assert table["nmi"].isna().tolist() == [True, True, False] and table["note"].tolist()[1:] == ["a, b", "a, b"]
    assert table["good"].tolist()[1:] == [False, True]
    assert [path.name for path in out.parent.iterdir() if path.suffix != ".lock"] == ["runs.csv"]


def test_results_of_another_grid_or_objective_are_left_alone(out):
    run(Counted(), GRID, out=out)
    before, objective = out.read_bytes(), Counted()
    with pytest.raises(
        ValueError, match=r"runs.csv holds runs over r, k, but the grid is over r, t: give another file"
    ):
        sweep(objective, {"r": [2], "t": [1]}, out=out)

    def other(settings, seed):
        raise AssertionError

    with pytest.raises(ValueError, match=r"holds runs of .*Counted, not of .*other"):
        sweep(other, GRID, out=out)
    assert out.read_bytes() == before and not objective.calls


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", "is no table of a sweep; its columns are a, b"),
        (b"objective,r,k,seed,score,seconds,error\nx,2\n", "row 2 of .* has 2 cells, but there are 7"),
        (b"\xff\xfe\x00\n", "is no table of runs"),
        (b'objective,r,k,seed,seconds,error\n"x,2,1,0,1,\n', "is no table of runs"),
    ],
)
def test_a_file_that_is_no_such_table_is_left_alone(content, message, tmp_path):
    path = tmp_path / "runs.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        sweep(Counted(), GRID, out=path)
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match="is a directory"):
        sweep(Counted(), GRID, out=tmp_path)


def test_a_torn_line_is_ignored_and_written_over(out):
    objective = Counted()
    run(objective, GRID, out=out)
    whole = out.read_bytes()
    for torn in (whole[:-3], whole[: whole.find(b"\n") - 2]):
        out.write_bytes(torn)
        pending = len(plan(objective, GRID, out=out).pending)
        assert pending == (1 if torn.count(b"\n") else 4)
        assert run(objective, GRID, out=out)["score"].tolist() == [2, 6, 4, 12]
        assert out.read_bytes().count(b"\n") == 5


@pytest.fixture(scope="module")
def processes():
    """Makes processes that start from a clean one, in which the package is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["analysis"])
    return context.Process


def append_rows(path, name):
    table = Table(path, ("name", "row"), ("error",))
    for row in range(25):
        # Each brings columns of its own, for which the file is replaced.
        table.append({"name": name, "row": row, f"c{row % 3}{name}": "x" * 50})


def test_several_processes_append_whole_rows(processes, tmp_path):
    writers = [processes(target=append_rows, args=(tmp_path / "t.csv", name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = Table(tmp_path / "t.csv", ()).rows()
    assert sorted((row["name"], int(row["row"])) for row in rows) == [(name, row) for name in "ab" for row in range(25)]
    assert all(row[f"c{int(row['row']) % 3}{row['name']}"] == "x" * 50 for row in rows)


LONG = {"i": list(range(20))}


def recorded(log):
    """An objective that writes down its calls."""

    def objective(settings, seed):
        with open(log, "a") as file:
            file.write(f"{settings['i']}\n")
        time.sleep(0.03)
        return {"score": settings["i"], f"only{settings['i'] % 4}": 1}

    return objective


def sweep_long(out, log, n_jobs):
    run(recorded(str(log)), LONG, out=out, n_jobs=n_jobs)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_sweep_that_is_killed_goes_on_where_it_was(n_jobs, processes, tmp_path):
    out, log = tmp_path / "runs.csv", tmp_path / "calls"

    def whole():
        return [row["i"] for row in Table(out, ()).rows()]

    rng, kept = random.Random(n_jobs), 0
    for _ in range(3):
        process = processes(target=sweep_long, args=(out, log, n_jobs))
        process.start()
        while len(whole()) == kept and process.is_alive():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert len(whole()) > kept and len(set(whole())) == len(whole()), "no row is lost or torn"
        kept = len(whole())
    # Workers without a master end what they do; what the table holds is not done again.
    time.sleep(0.3)
    before = log.read_text().count("\n")
    table = run(recorded(str(log)), LONG, out=out)
    assert table["score"].tolist() == LONG["i"] and (table["error"] == "").all()
    assert log.read_text().count("\n") - before == 20 - kept


# Objectives


def test_numbers_of_all_kinds_become_pythons():
    found = dict(score=np.float32(0.5), a=torch.tensor(3), b=np.int64(4), c=torch.tensor(0.25), d=None, e="x", f=True)
    row = checked(found, {"r": 2}, 0)
    assert row == dict(score=0.5, a=3, b=4, c=0.25, d=None, e="x", f=True)
    assert [type(row[name]) for name in "abc"] == [int, int, float]
    assert checked({"score": 1, "r": 2.0, "seed": 0}, {"r": 2}, 0) == {"score": 1}, "settings may be repeated"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "returns a mapping with a score, got NoneType"),
        ({}, "no number 'score'; they are empty"),
        ({"accuracy": 1}, "no number 'score'; they are accuracy"),
        ({"score": "high"}, "no number 'score'"),
        ({"score": torch.zeros(2)}, "'score' is no number"),
        ({"score": 1, "r": 3}, "'r' is 3, but the run's setting of that name 2"),
        ({"score": 1, "error": "x"}, "may not be called 'error'"),
        ({"score": 1, 2: 3}, "may not be called 2"),
    ],
)
def test_results_that_cannot_be_kept_are_errors(found, message):
    with pytest.raises((ValueError, TypeError), match=message):
        checked(found, {"r": 2}, 0)


def test_an_objective_cannot_change_the_settings(out):
    def objective(settings, seed):
        settings["layers"].append(9)
        return {"score": settings.pop("r")}

    assert run(objective, {"r": [1], "layers": [[1, 2]]}, out=out)["layers"].tolist() == [[1, 2]]
    assert text([1, 2.0]) == "[1, 2.0]"
