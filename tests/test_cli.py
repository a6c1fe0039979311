"""The command line: figures and reports into files, and one line on what is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import adapted, batch_for, build
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from analysis.__main__ import main
from analysis.figures import FIGURES
from analysis.report import files

DOMAINS = np.array(["left", "right", "up"] * 4)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with all that commands read."""
    root = tmp_path_factory.mktemp("cli")
    adapted("bert", t=2, p=2).save_pretrained(root / "adapter")
    build("bert").save_pretrained(root / "base")
    batch = {name: value.numpy() for name, value in batch_for("bert", 12).items()}
    np.savez(root / "data.npz", **batch, domain=DOMAINS)
    loads = [{"step": step, **{f"load/group_{g}": 1 / 3 for g in range(3)}} for step in (10, 20)]
    (root / "trainer_state.json").write_text(json.dumps({"log_history": loads}))
    runs = [dict(method=m, parameters=n, score=n / s, k=n, t=1) for m in "ab" for n in (2, 4) for s in (1, 2)]
    pd.DataFrame(runs).to_csv(root / "runs.csv", index=False)
    return root


@pytest.fixture
def command(here, tmp_path, monkeypatch, capsys):
    """Run a command beside the files; gives its exit status, and what it wrote to both streams."""
    for path in here.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        try:
            status = main(list(argv))
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return run


def changed(source, directory, change):
    """A copy of an adapter with other tensors."""
    shutil.copytree(source, directory)
    path = directory / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


WITH_DATA = ["--model", "base", "--data", "data.npz", "--labels", "domain", "--log", "trainer_state.json"]
ALL = ["--adapter", "adapter", *WITH_DATA, "--runs", "runs.csv"]
MARKS = {"pdf": b"%PDF", "svg": b"<?xml", "eps": b"%!PS", "png": b"\x89PNG"}


@pytest.mark.parametrize("name", list(FIGURES))
def test_every_figure_can_be_drawn(name, command):
    status, out, err = command("figure", name, *ALL, "-o", f"{name}.svg")
    assert (status, out, err) == (0, f"{name}.svg\n", "")
    text = Path(f"{name}.svg").read_text()
    assert text.startswith("<?xml") and "<text" in text and "no finite values" not in text


@pytest.mark.parametrize("suffix", list(MARKS))
def test_the_format_is_that_of_the_name(suffix, command):
    assert command("figure", "parameters", "--style", "slides", "-o", f"a.{suffix}")[0] == 0
    assert Path(f"a.{suffix}").read_bytes().startswith(MARKS[suffix])


def test_widths_and_columns(command):
    argv = ["figure", "trade-off", "--runs", "runs.csv", "--width", "aaai-column", "--score", "k", "-o", "a.svg"]
    assert command(*argv)[0] == 0
    assert 'width="237.6pt"' in Path("a.svg").read_text(), "3.3 inches"


def test_a_layer_can_be_chosen(command):
    status, _, err = command("figure", "core-slices", "--adapter", "adapter", "--layer", "no.such", "-o", "a.png")
    assert status == 1 and "'no.such' names 0 of" in err
    assert (
        command("figure", "core-slices", "--adapter", "adapter", "--layer", "1.attention.self.query", "-o", "a.png")[0]
        == 0
    )


def test_a_report(command):
    status, out, err = command("report", "adapter", *WITH_DATA, "-o", "report.html")
    assert (status, out, err) == (0, "report.html\n", "")
    assert Path("report.html").read_text().startswith("<!DOCTYPE html>")
    assert oct(Path("report.html").stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


USAGE = [
    ([], "required"),
    (["figure", "pie", "-o", "a.pdf"], "'pie' is no figure; the figures are core-slices"),
    (["figure", "load", "-o", "a.pdf"], "figure load needs --log"),
    (["figure", "flow", "--adapter", "adapter", "-o", "a.pdf"], "needs --data and --labels"),
    (["figure", "spectra", "-o", "a.pdf"], "needs --adapter"),
    (["figure", "spectra", "--adapter", "adapter", "-o", "a.docx"], "written as pdf, svg, eps, png"),
    (["figure", "spectra", "--adapter", "adapter"], "required: -o"),
    (["figure", "spectra", "--adapter", "adapter", "--style", "poster", "-o", "a.pdf"], "invalid choice: 'poster'"),
    (["report", "adapter", "--labels", "domain", "-o", "a.html"], "--labels names an entry of the data"),
    (["report", "adapter", "--model", "base", "--data", "data.npz", "--samples", "0", "-o", "a"], "at least 1, got 0"),
]


@pytest.mark.parametrize("argv, message", USAGE)
def test_a_wrong_command_line_is_one_line_and_status_2(argv, message, command):
    status, out, err = command(*argv)
    assert status == 2 and out == "" and message in err and err.count("\n") == 1 and "Traceback" not in err


DATA = ["--model", "base", "--data"]
FAILURES = [
    (["report", "none", "-o", "a.html"], "none holds no adapter_config.json"),
    (["report", "base", "-o", "a.html"], "holds no adapter_config.json"),
    (["report", "lora", "-o", "a.html"], "configures a LORA adapter"),
    (["report", "adapter", *DATA, "none.npz", "-o", "a.html"], "there is no file none.npz"),
    (["report", "adapter", "--data", "data.npz", "-o", "a.html"], "the base model has to be given"),
    (["report", "adapter", "--model", "./none", "--data", "data.npz", "-o", "a.html"], "no directory ./none"),
    (["report", "adapter", "--model", "lora", "--data", "data.npz", "-o", "a.html"], "'lora' (the directory)"),
    (["report", "adapter", "--model", "vit", "--data", "data.npz", "-o", "a.html"], "report: "),
    (["report", "adapter", *DATA, "wide.npz", "-o", "a.html"], "BertForSequenceClassification cannot be run on wide"),
    (["report", "adapter", *DATA, "data.npz", "--labels", "genre", "-o", "a.html"], "no labels 'genre'; it holds"),
    (["report", "adapter", "--log", "none.json", "-o", "a.html"], "none.json"),
    (["report", "adapter", "--log", "runs.csv", "-o", "a.html"], "runs.csv is not a JSON file"),
    (["report", "adapter", "--log", "empty.json", "-o", "a.html"], "holds no log_history"),
    (["report", "adapter", "-o", "none/a.html"], "there is no directory none to write a.html to"),
    (["report", "routerless", *DATA, "data.npz", "-o", "a.html"], "lacks 1 of"),
    (["report", "cut", "-o", "a.html"], "not a whole safetensors file"),
    (["figure", "load", "--log", "unbalanced.json", "-o", "a.pdf"], "holds no loads of groups"),
    (["figure", "trade-off", "--runs", "runs.csv", "--score", "loss", "-o", "a.pdf"], "runs lack the columns loss"),
    (["figure", "trade-off", "--runs", "nothing.csv", "-o", "a.pdf"], "nothing.csv cannot be read as a table"),
    (["figure", "router-map", "--adapter", "broken", *DATA, "data.npz", "-o", "a.pdf"], "not finite"),
    (["report", "broken", "-o", "a.html"], "not finite"),
]


@pytest.fixture
def broken_files(here, tmp_path):
    base = get_peft_model(build("bert"), LoraConfig(target_modules=["query"]))
    base.save_pretrained(tmp_path / "lora")
    build("vit").save_pretrained(tmp_path / "vit")
    np.savez(tmp_path / "wide.npz", input_ids=np.full((2, 4), 10_000))
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "nothing.csv").write_text("")
    (tmp_path / "unbalanced.json").write_text('{"log_history": [{"step": 1, "loss": 2.0}]}')
    changed(here / "adapter", tmp_path / "routerless", lambda s: {k: v for k, v in s.items() if "centroids" not in k})
    changed(here / "adapter", tmp_path / "broken", lambda s: {k: _nan(v) for k, v in s.items()})
    shutil.copytree(here / "adapter", tmp_path / "cut")
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(b"cut")


def _nan(tensor):
    return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("argv, message", FAILURES, ids=lambda value: value if isinstance(value, str) else None)
def test_what_cannot_be_done_is_one_line_and_status_1(argv, message, broken_files, command):
    status, out, err = command(*argv)
    assert status == 1 and out == "" and message in err and err.count("\n") == 1 and "Traceback" not in err
    assert not Path("a.html").exists() and not Path("a.pdf").exists()


def test_what_is_left_of_a_damaged_adapter_is_shown(broken_files, command):
    adapter = "routerless"
    status, _, err = command("report", adapter, "-o", "a.html")
    assert (status, err) == (0, "")
    assert "no router chooses" in Path("a.html").read_text()
    for name in ("core-slices", "expert-similarity", "layer-group-similarity", "spectra"):
        assert command("figure", name, "--adapter", adapter, "-o", "a.svg")[0] == 0
        assert ("no finite values" in Path("a.svg").read_text()) == (adapter == "broken")


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.html"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("ne")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.write_atomically(path, write)
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["a.html"]


@pytest.mark.parametrize("command_name", [[], ["figure"], ["report"]])
def test_help_is_complete(command_name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command_name, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "examples:" in text and "python -m analysis report" in text
    if command_name == ["figure"]:
        assert all(name in text for name in FIGURES) and "aaai-column" in text
    if command_name:
        assert all(option in text for option in ("--model", "--data", "--labels", "--samples", "--log", "--output"))


def test_as_a_program_without_a_display(here):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("DISPLAY", None)
    argv = [sys.executable, "-m", "analysis", "figure", "spectra", "--adapter", "adapter", "-o", "spectra.pdf"]
    found = subprocess.run(argv, cwd=here, env=environment, capture_output=True, text=True)
    # bitsandbytes and torchao, which PEFT imports where they are installed, speak of kernels that this machine has not.
    foreign = r"Failed to load (CPU gemm_4bit_forward|\S*/torchao/)|W.*_pytree\.py:\d+\] <enum '(Kernel|ScaleCalc)"
    errors = [line for line in found.stderr.splitlines() if not re.match(foreign, line)]
    assert (found.returncode, found.stdout, errors) == (0, "spectra.pdf\n", [])
    assert (here / "spectra.pdf").read_bytes().startswith(b"%PDF")
