"""The maths example at reduced size: what it trains on, how it scores, its offline default, and the hub's layouts."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # examples are not part of what is installed

import math_reasoning
from common import arithmetic, metamath, results
from common.answers import extract, same
from common.exercises import Exercise, Exercises, score, written

SHORT = ["--pretrain-steps", "2", "--samples", "16", "--test-samples", "8", "--epochs", "1", "--batch-size", "8"]


@pytest.fixture
def tokenizer():
    return arithmetic.new_tokenizer()


def places(directory, *options):
    return ["--output", str(directory / "out"), "--results", str(directory / "results.csv"), *options]


# Exercises


def test_every_kind_is_worked_and_ends_in_its_answer():
    train, test = arithmetic.drawn(seed=0, sizes=(20, 5))
    assert len(train) == 20 * len(arithmetic.KINDS) and not {e.prompt for e in train} & {e.prompt for e in test}
    for exercise in train:
        assert same(extract(exercise.solution), exercise.answer)
        for step in exercise.solution.split(arithmetic.MARK)[0].split(";")[:-1]:
            problem, result = step.split("=")
            assert eval(problem) == int(result)  # all digits and signs are the example's own


def test_kinds_work_as_described():
    numbers = {kind: [25, 28, 9][: 3 if kind in ("add", "net") else 2] for kind in arithmetic.KINDS}
    found = {kind: arithmetic.exercise(kind, drawn) for kind, drawn in numbers.items()}
    assert found["net"].prompt == "net 25 28 9:" and found["net"].solution == "25+28=53;53-9=44;####44"
    assert found["clock"].solution == "25+28=53;53-24=29;29-24=5;####5"
    answers = {kind: exercise.answer for kind, exercise in found.items()}
    assert answers == dict(add="62", net="44", rest="7", gap="3", most="28", double="22", mirror="35", clock="5")


def test_the_tokenizer_reads_back_what_it_reads_and_is_saved(tokenizer, tmp_path):
    text = "double 12 34:12+12=24;24-34=-10;####-10"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokenizer.save_pretrained(tmp_path)
    assert math_reasoning.tokenizer_of(str(tmp_path))(text) == tokenizer(text)


def test_the_loss_is_of_solutions_alone(tokenizer):
    exercise = arithmetic.exercise("gap", [12, 56])
    rows = Exercises([exercise, arithmetic.exercise("add", [1, 2, 3])], tokenizer, 64, "training")
    batch = DataCollatorForSeq2Seq(tokenizer)([rows[0], rows[1]])
    learnt = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(learnt) == f"{exercise.solution}{arithmetic.END}"
    known = batch["labels"] != -100
    assert (batch["input_ids"][known] == batch["labels"][known]).all()
    assert not known[batch["attention_mask"] == 0].any()
    cut = Exercises([exercise], tokenizer, 12, "training")[0]
    assert [len(values) for values in cut.values()] == [12, 12, 12]


def test_plain_exercises_are_of_one_step():
    drawn = arithmetic.plain_exercises(50, np.random.default_rng(0))
    assert {exercise.kind for exercise in drawn} == set(arithmetic.PLAIN)
    for exercise in drawn:
        assert exercise.solution.count("=") == 1 and same(extract(exercise.solution), exercise.answer)


def test_scores_are_shares_by_kind():
    exercises = [Exercise("", "", "7", "a"), Exercise("", "", "8", "a"), Exercise("", "", "9", "b")]
    assert score(exercises, ["#### 7", "#### 7", "The answer is: 9.0"]) == {"a": 50.0, "b": 100.0}


class Parrot(LlamaForCausalLM):
    """Answers with the last token of the prompt, wherever padding has put it."""

    def generate(self, input_ids, attention_mask, max_new_tokens, **options):
        assert attention_mask[:, -1].all() and not options["do_sample"]
        return torch.cat([input_ids, input_ids[:, -1:].expand(-1, max_new_tokens)], 1)


def test_prompts_of_any_length_are_padded_on_the_left(tokenizer):
    size = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=40)
    model = Parrot(LlamaConfig(**size))
    prompts = ["add 12 3", "4", "most 5", "1", "2"]
    assert written(model, tokenizer, prompts, batch_size=2, new_tokens=2, title="") == ["33", "44", "55", "11", "22"]
    assert tokenizer.padding_side == "right"


# The offline default


def test_it_adapts_scores_saves_draws_and_does_not_repeat(tmp_path, capsys, monkeypatch):
    methods = ["tucka", "lora", "full"]
    options = places(tmp_path, *SHORT, "--method", *methods)
    table = math_reasoning.main(options)
    assert sorted(table["method"]) == sorted(methods) and set(table["metric"]) == {"exact match (%)"}
    assert ((table["score"] >= 0) & (table["score"] <= 100)).all() and (table["train_rows"] == 16).all()
    assert (tmp_path / "out" / "arithmetic.png").stat().st_size > 10_000
    scores = json.loads(next((tmp_path / "out").glob("arithmetic-tucka-*/scores.json")).read_text())
    assert set(scores) == {"validation", "test"} and set(scores["test"]) == set(arithmetic.KINDS)
    lines = next((tmp_path / "out").glob("arithmetic-tucka-*/test.jsonl")).read_text().splitlines()
    assert len(lines) == 8 and json.loads(lines[0])["prompt"].startswith("add ")
    assert all((path / "adapter").exists() for path in (tmp_path / "out").glob("arithmetic-*-seed0-*"))

    def fail(*args, **kwargs):
        raise AssertionError("a run that is in the table is not repeated")

    monkeypatch.setattr("common.study.run", fail)
    again = math_reasoning.main(options)
    pd.testing.assert_frame_equal(again, table)


# The hub's layouts


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A tiny Llama with a tokenizer, and data in the layouts of the hub's repositories."""
    root = tmp_path_factory.mktemp("hub")
    tokenizer = arithmetic.new_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(root / "llama")
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    LlamaForCausalLM(LlamaConfig(**size, vocab_size=len(tokenizer), eos_token_id=1)).save_pretrained(root / "llama")
    rows = [
        {
            "query": f"What is {n} plus {n % 10}?",
            "original_question": f"question {n % 10}",
            "response": f"{n} + {n % 10} = {n + n % 10}\nThe answer is: {n + n % 10}",
            "type": "GSM_Rephrased",
        }
        for n in range(60)
    ]
    (root / "metamath").mkdir()
    (root / "metamath" / "MetaMathQA-395K.json").write_text(json.dumps(rows))
    (root / "gsm8k" / "main").mkdir(parents=True)
    test = pd.DataFrame({"question": ["1 + 1?", "2 + 2?"], "answer": ["<<1+1=2>>\n#### 2", "#### 4"]})
    test.to_parquet(root / "gsm8k" / "main" / "test-00000-of-00001.parquet")
    for subject, solution in (("algebra", r"so \boxed{\frac{1}{2}}."), ("geometry", r"\boxed{90^\circ}")):
        (root / "math" / subject).mkdir(parents=True)
        frame = pd.DataFrame({"problem": ["Solve."], "level": ["1"], "type": [subject], "solution": [solution]})
        frame.to_parquet(root / "math" / subject / "test-00000-of-00001.parquet")
    return root


def test_validation_rewrites_no_question_that_is_trained_on(hub):
    train, validation = metamath.training_exercises(hub / "metamath", samples=40, validation=5)
    original = lambda exercise: int(exercise.answer) - int(exercise.solution.split()[0])  # noqa: E731
    assert len(train) == 40 and len(validation) == 5
    assert not set(map(original, train)) & set(map(original, validation))
    assert "### Instruction:\nWhat is " in train[0].prompt and train[0].prompt.endswith("### Response:")


def test_tests_are_read_with_their_answers(hub):
    gsm8k = metamath.test_exercises("gsm8k", hub / "gsm8k", None)
    assert [exercise.answer for exercise in gsm8k] == ["2", "4"] and {e.kind for e in gsm8k} == {"gsm8k"}
    both = metamath.test_exercises("math", hub / "math", None)
    assert [exercise.answer for exercise in both] == [r"\frac{1}{2}", r"90^\circ"]
    assert len(metamath.test_exercises("math", hub / "math", 1)) == 1


def test_other_data_are_refused_by_their_columns(hub):
    with pytest.raises(ValueError, match="has no column query, response; it has problem, level, type, solution"):
        metamath.loaded(metamath.TRAINING, "test", hub / "math" / "algebra")


def test_the_paper_s_settings_run_on_local_folders(hub, tmp_path, monkeypatch):
    tests = ["--test-path", f"gsm8k={hub / 'gsm8k'}", f"math={hub / 'math'}"]
    data = ["--dataset", "metamath", "--dataset-path", str(hub / "metamath"), *tests, "--model", str(hub / "llama")]
    short = ["--samples", "8", "--test-samples", "2", "--epochs", "1", "--batch-size", "4"]
    monkeypatch.setattr(math_reasoning, "NEW_TOKENS", 4)
    method = "tucka-paper:r=4,alpha=2.0"
    (row,) = math_reasoning.main(places(tmp_path, *data, *short, "--preset", "paper", "--method", method)).to_dict(
        "records"
    )
    settings = results.read_settings(row["settings"])
    assert row["dataset"] == "metamath" and row["learning_rate"] == 1e-3 and settings["bf16"] is True
    assert {name: settings[name] for name in ("k", "t", "p", "perturb_scale", "schedule", "warmup")} == dict(
        k=4, t=2, p=2, perturb_scale=20.0, schedule="cosine", warmup=0.03
    )
    scores = json.loads(next((tmp_path / "out").glob("*/scores.json")).read_text())
    assert set(scores["test"]) == {"gsm8k", "math"}


def test_a_test_s_folder_is_named(capsys):
    with pytest.raises(SystemExit):
        math_reasoning.main(["--dataset", "metamath", "--test-path", "data/gsm8k"])
    assert "tests are gsm8k and math, each as NAME=DIRECTORY; got 'data/gsm8k'" in capsys.readouterr().err
