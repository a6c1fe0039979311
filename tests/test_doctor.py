"""The self-check: it passes on sound models, and leaves them as they were."""

import io

import pytest
import torch
import transformers as tf
from conftest import adapted, batch_for, build, plain_config, router_of, text_batch
from doctor_bench import GENERATING, assert_found, check, digest, fresh
from peft import PeftModel
from torch import nn

import tucka
from tucka.diagnosis import CHECKS, doctor, files
from tucka.diagnosis.comparison import main_output, relative, route_difference, tolerance_of
from tucka.diagnosis.generation import _prompts
from tucka.diagnosis.report import Diagnosis, Row
from tucka.diagnosis.subject import Subject
from tucka.routing import Route

# --- sound models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "deberta", "vit", "gpt2", "llama", "t5", "clip"])
def test_a_sound_model_passes_and_is_left_as_found(name, capsys):
    heads = dict(modules_to_save=["classifier"]) if name in ("bert", "vit") else {}
    model = fresh(name, **heads).train()
    batch = batch_for(name, 5, **({"left": True} if name in GENERATING else {}))
    if name in ("llama", "bert"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model(**batch).loss.backward()
    before = digest(model)
    diagnosis = doctor(model, batch)
    after = digest(model)
    for part, value in before.items():
        assert after[part] == value, part
    assert capsys.readouterr().out == f"{diagnosis}\n"
    assert diagnosis.ok and [row.check for row in diagnosis.rows] == list(CHECKS)
    outcomes = {row.check: row.outcome for row in diagnosis.rows}
    text, expected = name != "vit", dict.fromkeys(CHECKS, "pass")
    expected["cached generation"] = "pass" if name in GENERATING else "skipped"
    expected["padding is masked"] = expected["padding invariance"] = "pass" if text else "skipped"
    expected["dead groups"] = outcomes["dead groups"]  # five samples may tell or not
    assert outcomes == expected and outcomes["dead groups"] in ("pass", "skipped")
    if name in GENERATING:
        assert diagnosis["cached generation"].measured < 1e-4 and not diagnosis["cached generation"].why
        assert diagnosis["padding invariance"].measured < 1e-4


def test_a_trained_model_passes_in_double_precision():
    model = adapted("llama", torch.float64, target_modules="all-linear").train()
    diagnosis = doctor(model, batch_for("llama", 6), file=io.StringIO())
    assert diagnosis.ok and diagnosis["checkpointing"].tolerance == 1e-8
    assert diagnosis["identity at start"].why == "trained: the cores are not zero"


def test_every_kind_of_batch_is_taken():
    mapping = batch_for("bert", 4)
    pixels = batch_for("vit", 4)["pixel_values"]
    pair = (mapping["input_ids"], mapping["attention_mask"])
    for name, batch in (("bert", tf.BatchEncoding(mapping)), ("vit", pixels), ("vit", (pixels,)), ("llama", pair)):
        row = check("batch invariance", adapted(name), batch)
        assert row.outcome == "pass" and row.measured is not None


def test_an_adapter_that_transformers_added():
    model = build("bert")
    model.add_adapter(plain_config(r=2, k=2, target_modules=["query"]), "first")
    diagnosis = doctor(model, batch_for("bert"), file=io.StringIO())
    assert diagnosis.ok and diagnosis["save and reload"].outcome == "skipped"


def test_the_adapter_named_is_examined_and_the_active_one_stays():
    model = adapted("bert", target_modules=["query"], modules_to_save=["classifier"])
    model.add_adapter("other", plain_config(r=2, k=2, t=1, target_modules=["value"], modules_to_save=["classifier"]))
    before, table = digest(model), io.StringIO()
    diagnosis = doctor(model, batch_for("bert"), adapter_name="other", file=table)
    assert digest(model) == before
    assert "adapter 'other'" in table.getvalue() and diagnosis.ok
    assert diagnosis["identity at start"].outcome == "pass", "the active adapter is not the identity"
    assert diagnosis["router started"].outcome == "warn"
    with pytest.raises(ValueError, match="adapter 'none' is not one of"):
        doctor(model, batch_for("bert"), adapter_name="none", file=io.StringIO())


def test_pinned_and_recorded_routes_are_the_users_own():
    model = adapted("bert", routing="sample")
    with tucka.record_routes(model) as routes, tucka.pin_route(model, [1, 1, 1]):
        row = check("batch invariance", model, batch_for("bert", 3))
        assert row.outcome == "pass" and not routes


def test_an_adapter_loaded_for_inference(tmp_path):
    adapted("bert").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert check("what trains", model).outcome == "skipped"
    assert check("gradients arrive", model).outcome == "pass"
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_batch_of_the_longest_length_is_padded_in_place_of_tokens():
    batch = text_batch(3, positions=32)  # as many as the model has
    row = check("padding invariance", adapted("bert"), batch)
    assert row.outcome == "pass" and row.measured is not None


def test_prompts_end_where_generation_begins():
    batch = text_batch(5)  # row 1 is padded on the right
    prompts = _prompts(Subject.of(adapted("gpt2"), dict(batch, labels=batch["input_ids"]), None))
    assert set(prompts) == {"input_ids", "attention_mask"} and len(prompts["input_ids"]) == 4
    assert prompts["attention_mask"][1].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(prompts["input_ids"][1, 3:], batch["input_ids"][1, :4])
    kept = _prompts(Subject.of(adapted("t5"), text_batch(5, positions=70), None))
    assert torch.equal(kept["input_ids"], text_batch(5, positions=70)["input_ids"][:4, :64])


def test_what_the_base_model_does_by_itself_is_not_held_against_the_adapter(monkeypatch):
    model, original = adapted("gpt2"), tf.GPT2LMHeadModel.forward

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = output.logits * kwargs["input_ids"].shape[1]  # logits that count columns
        return output

    monkeypatch.setattr(tf.GPT2LMHeadModel, "forward", forward)
    for name in ("padding invariance", "cached generation"):
        row = check(name, model, batch_for("gpt2"))
        assert row.outcome == "pass" and "routes alone compared" in row.why, row


# --- what goes wrong in a check --------------------------------------------------------------------------------------


def test_a_check_that_raises_leaves_everything_as_found_and_the_others_go_on(monkeypatch):
    model = adapted("bert", modules_to_save=["classifier"]).train()
    batch = batch_for("bert", 4)

    def broken(subject):
        subject.model.train()
        subject.run()
        torch.rand(3)
        raise RuntimeError("something\n   odd")

    calls = []

    def third_time(output):
        calls.append(output)
        if len(calls) == 3:  # while the second copy of the adapter is in the model
            assert files.COPY in model.peft_config
            raise MemoryError("no room")
        return main_output(output)

    monkeypatch.setitem(CHECKS, "precision", broken)
    monkeypatch.setattr(files, "main_output", third_time)
    before = digest(model)
    diagnosis = doctor(model, batch, file=io.StringIO())
    assert digest(model) == before
    assert_found(diagnosis["precision"], "error", "RuntimeError: something odd", "The check could not run")
    assert_found(diagnosis["save and reload"], "error", "MemoryError: no room", "report the message")
    assert not diagnosis.ok and diagnosis["disabled adapter"].outcome == "pass"


def test_a_batch_that_the_model_does_not_take():
    model = adapted("bert")
    before = digest(model)
    diagnosis = doctor(model, {"input_ids": "words"}, file=io.StringIO())
    assert digest(model) == before
    assert diagnosis["forward and routes"].outcome == "error" and diagnosis["finite numbers"].outcome == "pass"
    assert diagnosis["dead groups"].why == "the model does not run on this batch"


# --- numbers and table -----------------------------------------------------------------------------------------------


def test_differences():
    one = torch.tensor([1.0, -4.0])
    assert relative(one, one) == 0 and relative(one + 1, one) == 0.25
    assert relative(torch.tensor([float("nan"), -4.0]), one) == float("inf")
    with pytest.raises(ValueError, match=r"shapes \(3,\) and \(2,\) cannot be compared"):
        relative(torch.zeros(3), one)
    assert main_output((torch.ones(2, dtype=torch.long), one)) is one
    with pytest.raises(ValueError, match="no tensor of floating point"):
        main_output({"loss": None})
    assert tolerance_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())) == 1e-2


def test_a_tie_that_rounding_decides_is_no_difference():
    router = router_of(fresh())
    scores = torch.tensor([[[0.5, 0.1], [0.5 + 1e-6, 0.1]]])
    routes = [Route(torch.tensor([group]), None, scores) for group in (0, 1)]
    assert route_difference(*routes, router) == pytest.approx(1e-6, rel=0.1)
    apart = Route(torch.tensor([0]), None, torch.tensor([[[0.5, 0.1], [0.9, 0.1]]]))
    assert route_difference(apart, apart._replace(group=torch.tensor([1])), router) == pytest.approx(0.4)
    assert route_difference(apart, apart._replace(scores=None), router) == 0


def test_the_table_is_legible():
    words = "several words of some length " * 8
    rows = [
        Row("pass", "", "", 1.23456e-7, 2e-3, "batch invariance"),
        Row("fail", words, "something", 0.3, 2e-3, "padding invariance"),
        Row("skipped", words, check="cached generation"),
        Row("skipped", "short", check="checkpointing, reentrant"),
    ]
    diagnosis = Diagnosis("what was examined", tuple(rows))
    lines = str(diagnosis).splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert "batch invariance         pass     1.2e-07    0.002" in lines
    assert any(line.startswith("padding invariance       FAIL") for line in lines)
    assert "    do   something" in lines and lines[-1] == "1 passed, 1 failed, 2 skipped"
    assert any(line.endswith("skipped                     short") for line in lines)
    assert repr(diagnosis) == "Diagnosis(1 passed, 1 failed, 2 skipped)" and not diagnosis.ok
    with pytest.raises(KeyError, match="'padding' is no check; the checks are batch invariance"):
        diagnosis["padding"]
