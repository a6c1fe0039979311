"""The serving example, at a size that runs in seconds."""

import sys
from pathlib import Path

from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # examples are not part of what is installed

import serve_as_lora
from common import results


def test_it_exports_names_and_agrees(tmp_path, capsys):
    table = tmp_path / "results.csv"
    options = ["--updates", "8", "--requests", "12", "--output", str(tmp_path), "--results", str(table)]
    served = serve_as_lora.main(options)
    assert served.choices_agree == 1.0 and served.names == served.chosen
    assert len(served.names) == 12 and len(set(served.names)) > 1
    assert 0 <= served.tokens_agree <= 1 and set(served.accuracy) == {
        "base model", "adapted model", "LoRAs of its groups",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert f"vllm serve {tmp_path / 'base'} --enable-lora --max-loras 4 --max-lora-rank 8" in printed
    assert all(f"group-{group}={tmp_path / 'loras' / f'group-{group}'}" in printed for group in range(4))
    height, width = imread(tmp_path / "agreement.png").shape[:2]
    assert width > 800 and height > 300
    (row,) = results.runs(table, "serve_as_lora").to_dict("records")
    assert row["score"] == round(100 * served.tokens_agree, 4) and row["adapter_parameters"] > 0
