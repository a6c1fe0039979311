"""The quickstart, at a size that runs in seconds."""

import importlib.util
from pathlib import Path

import pytest
from matplotlib.image import imread

PATH = Path(__file__).parents[1] / "examples" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    specification = importlib.util.spec_from_file_location("quickstart", PATH)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def small(directory, *options):
    sizes = ["--samples", "120", "--epochs", "1", "--pretrain-epochs", "1", "--batch-size", "32"]
    return [*sizes, "--output", str(directory), *options]


def test_it_adapts_compares_saves_reloads_and_draws(quickstart, tmp_path, capsys):
    results = quickstart.main(small(tmp_path))
    before, lora, tucka = results.rows
    assert before.parameters == 0 < tucka.parameters <= lora.parameters
    for row in results.rows:
        assert list(row.accuracy) == list(quickstart.SHIFTS) and all(0 <= a <= 100 for a in row.accuracy.values())
    assert results.reloads_equal
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in results.adapter.iterdir()}
    height, width = imread(results.figure).shape[:2]
    assert width > 800 and height > 300
    printed = capsys.readouterr().out
    assert "outputs are equal bit for bit" in printed
    for row in results.rows:
        assert row.method in printed and f"{row.parameters:,}" in printed


def test_the_paper_preset_can_be_asked_for(quickstart, tmp_path):
    options = ["--routing", "batch", "--form", "multiplicative", "--no-share-factors", "--no-shared-expert", "--r", "4"]
    assert quickstart.main(small(tmp_path, *options)).reloads_equal


def test_every_option_is_explained(quickstart, capsys):
    with pytest.raises(SystemExit):
        quickstart.main(["--help"])
    text = capsys.readouterr().out
    for option in ("--epochs", "--seed", "--output", "--learning-rate", "--routing", "--r ", "--alpha", "--threads"):
        assert option in text
    assert text.count("default:") >= 20
