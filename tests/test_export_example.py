"""The serving example, at a size that runs in seconds."""

import importlib.util
from pathlib import Path

PATH = Path(__file__).parents[1] / "examples" / "serve_as_lora.py"


def test_it_exports_names_and_agrees(tmp_path, capsys):
    specification = importlib.util.spec_from_file_location("serve_as_lora", PATH)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    served = module.main(["--updates", "8", "--requests", "12", "--output", str(tmp_path)])
    assert served.choices_agree == 1.0 and len(served.names) == 12 and len(set(served.names)) > 1
    assert 0 <= served.tokens_agree <= 1 and set(served.accuracy) == {
        "base model", "adapted model", "LoRAs of its groups",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert f"vllm serve {tmp_path / 'base'} --enable-lora --max-loras 4 --max-lora-rank 8" in printed
    assert all(f"group-{group}={tmp_path / 'loras' / f'group-{group}'}" in printed for group in range(4))
