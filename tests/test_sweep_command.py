"""Sweeps of scripts, and the command."""

import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sweep_bench import run

from analysis import sweep
from analysis.__main__ import main
from analysis.sweeps import ROW_FILE, Run, expand
from analysis.sweeps.spec import function_of, read_spec

SCRIPT = """
import argparse, json, os, sys
parser = argparse.ArgumentParser()
parser.add_argument("--r", type=int, required=True)
parser.add_argument("--rate", type=float)
parser.add_argument("--layers", nargs="+", default=[])
parser.add_argument("--fast", choices=["true", "false"])
parser.add_argument("--seed", type=int, required=True)
args = parser.parse_args()
if args.r == 13:
    sys.exit("thirteen")
print("training …")
row = {"score": args.r + args.seed, "words": " ".join(args.layers), "r": args.r}
row |= {"rate_was": args.rate, "fast_was": args.fast}
if args.r == 2:
    open(os.environ["ROW_FILE"], "w").write(json.dumps(row, indent=2))
elif args.r != 14:
    print("{not json}")
    print(json.dumps(row))
    print("done")
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT.replace("ROW_FILE", ROW_FILE))
    return path


def test_a_script_is_called_with_options_and_gives_a_row(script, out):
    grid = {"r": [1, 2], "rate": [-1e-3, None], "layers": [["q", "v"]], "fast": [True]}
    table = run(script, grid, seeds=[3], out=out)
    assert table["score"].tolist() == [4, 4, 5, 5] and set(table["words"]) == {"q v"} and table["fast_was"].all()
    assert table["rate_was"].tolist() == pytest.approx([-1e-3, np.nan, -1e-3, np.nan], nan_ok=True)
    assert set(table["objective"]) == {"train.py"}


def test_a_script_that_fails_says_how(script, out):
    with pytest.warns(UserWarning, match="2 of 2 runs failed"):
        table = sweep(script, {"r": [13, 14]}, out=out, progress=False)
    assert table["error"][0] == "RuntimeError: train.py ended with status 1: thirteen"
    assert "neither printed a JSON object" in table["error"][1]


def test_options_that_a_script_lacks_are_refused_before_anything_runs(script, out):
    with pytest.raises(
        ValueError, match=r"train.py has no option --rr, --k; it has --fast, --layers, --r, --rate, --s"
    ):
        sweep(script, {"rr": [1], "k": [2]}, out=out)
    assert not out.exists()


# The command


MODULE = """
def objective(settings, seed):
    if settings["r"] == 13:
        raise RuntimeError("thirteen")
    return {"score": settings["r"] + seed}
def check(settings):
    if settings["r"] < 0:
        raise ValueError("r is negative")
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, request):
    """Run the command beside files; gives its exit status, and what it wrote to both streams."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = f"objectives_{abs(hash(request.node.name))}"
    Path(f"{module}.py").write_text(MODULE)

    def run(spec, *options, name="spec.yaml"):
        Path(name).write_text(textwrap.dedent(spec).replace("MODULE", module))
        try:
            status = main(["sweep", name, *options])
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return run


def test_a_file_describes_a_sweep(command):
    spec = """
        objective: MODULE:objective
        check: MODULE:check
        grid: {r: [1, 2], lr: [1e-3]}
        seeds: [0, 10]
    """
    status, said, _ = command(spec, "--dry-run")
    assert (
        status == 0 and "4 runs, 0 of them in spec.csv (0 failed), 4 to do" in said and "r=2, lr=0.001, seed=10" in said
    )
    assert not Path("spec.csv").exists()
    assert command(spec) == (0, "spec.csv\n", "")
    table = pd.read_csv("spec.csv")
    assert table["score"].tolist() == [1, 2, 11, 12] and set(table["lr"]) == {0.001}
    assert "4 runs, 4 of them in spec.csv (0 failed), 0 to do" in command(spec, "--dry-run")[1]
    assert command(spec, "--out", "b.csv", "--jobs", "2", "--backend", "threading") == (0, "b.csv\n", "")
    assert sorted(pd.read_csv("b.csv")["score"]) == [1, 2, 11, 12]


def test_failed_runs_give_the_status_1_and_one_line(command):
    spec = '{"objective": "MODULE:objective", "grid": {"r": [1, 13]}, "out": "c.csv"}'
    status, said, err = command(spec, name="spec.json")
    assert (status, said) == (1, "") and err.count("\n") == 1
    assert "1 of 2 runs failed, the first (r=13, seed=0) with RuntimeError: thirteen" in err and "--retry-failed" in err
    assert (
        "2 runs, 2 of them in c.csv (1 failed), 1 to do"
        in command(spec, "--dry-run", "--retry-failed", name="a.json")[1]
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("grid: {r: [1]}", "does not say objective"),
        ("objective: MODULE:objective\ngrid: {r: [1]}\nseed: [1]", "unknown keys seed; the keys are objective, grid"),
        ("objective: MODULE:objective\ngrid: {r: [1], r: [2]}", "'r' occurs twice"),
        ("objective: MODULE:objective\ngrid: {r: [1, 1]}", "'r' has the value 1 twice"),
        ("objective: MODULE:nothing\ngrid: {r: [1]}", "there is no .*nothing"),
        ("objective: no.such.module:f\ngrid: {r: [1]}", "there is no no.such.module:f"),
        ("objective: 'a b:c'\ngrid: {r: [1]}", "written module:function"),
        ("objective: none.py\ngrid: {r: [1]}", "there is no script none.py"),
        ("objective: [1]\ngrid: {r: [1]}", "objective of spec.yaml is a text"),
        ("objective: MODULE:objective\ngrid: {r: [-1]}\ncheck: MODULE:check", "r=-1 cannot be: r is negative"),
        ("- 1", "holds no mapping"),
        ("a: [", "cannot be read"),
        ("a: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("objective: MODULE:objective\ngrid: {r: [1]}\njobs: many", "n_jobs is a number"),
    ],
)
def test_a_file_that_cannot_be_is_refused_in_one_line(spec, message, command):
    status, said, err = command(spec)
    assert (status, said) == (1, "") and err.count("\n") == 1, err
    assert re.search(message, err), err
    assert not Path("spec.csv").exists()


@pytest.mark.parametrize("options", [["--jobs", "0"], ["--jobs", "x"], ["--backend", "slurm"], ["--unknown"]])
def test_wrong_options_give_the_status_2(options, command):
    status, _, err = command("objective: MODULE:objective\ngrid: {r: [1]}", *options)
    assert status == 2 and err.count("\n") == 1


def test_help_tells_all(command):
    status, said, _ = command("", "--help")
    assert status == 0 and all(word in said for word in (*read_spec.__globals__["KEYS"], ROW_FILE, "--dry-run"))


def test_json_and_files_are_checked(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text('{"grid": {"r": [1], "r": [2]}}')
    with pytest.raises(ValueError, match="'r' occurs twice"):
        read_spec(path)
    with pytest.raises(ValueError, match=r"\.yaml or \.json file"):
        read_spec(tmp_path / "spec.txt")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_spec(tmp_path / "none.yaml")
    assert function_of("json:dumps") is json.dumps


# The benchmark


def test_the_spec_of_the_benchmark_is_a_sweep_of_sixty_runs_and_more():
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from benchmarks.sweep import check

    spec = read_spec(Path(__file__).parents[1] / "benchmarks" / "sweeps" / "experts.json")
    runs = expand(spec["grid"], spec["seeds"])
    for planned in runs:
        check(planned.settings)
    tucka = [planned.settings for planned in runs if planned.settings["method"] == "tucka"]
    assert len(tucka) >= 60 and {s["k"] * s["t"] for s in tucka} == {1, 2, 4, 8, 16, 32, 64}
    assert {s["r"] for s in tucka} == {1, 2, 4, 8, 16} and isinstance(runs[0], Run)
    good = {"task": "digits4", "method": "tucka", "lr": 0.01}
    for wrong, message in (({"q": 1}, "has no q"), ({"k": 0}, "k=0"), ({"task": "none"}, "tasks are")):
        with pytest.raises(ValueError, match=message):
            check({**good, **wrong})
    with pytest.raises(ValueError, match="task, lr must be given"):
        check({"method": "tucka"})
