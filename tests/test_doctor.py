"""The self-check: it passes on sound models, says why and what to do on broken ones, and leaves both as they were."""

import io
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import adapted, batch_for, batches_for, build, plain_config, randomise, router_of, text_batch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import tucka
from tucka.checkpointing import _Block
from tucka.diagnosis import CHECKS, doctor, files, gradients
from tucka.diagnosis.comparison import main_output, relative, route_difference, tolerance_of
from tucka.diagnosis.examination import _run
from tucka.diagnosis.generation import _prompts
from tucka.diagnosis.loads import chance_of_empty, samples_needed
from tucka.diagnosis.report import Diagnosis, Row
from tucka.diagnosis.subject import Subject
from tucka.dispatch import Dispatcher
from tucka.layer import TuckALayer
from tucka.model import layers_of
from tucka.routing import Route

GENERATING = ("gpt2", "llama", "t5")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func", "_active_adapter", "_disable_adapters")


def fresh(name="bert", samples=24, **fields):
    """A model as `apply` leaves it, before its first step."""
    config = plain_config(**{"r": 4, "k": 2, "affinity": "cosine", "init_router": "kmeans", **fields})
    return tucka.apply(build(name), config, calibration=batches_for(name, samples), progress=False)


def check(name, model, batch=None):
    """Run one check as `doctor` does."""
    subject = Subject.of(model, batch_for("bert", 4) if batch is None else batch, None)
    return _run(CHECKS[name], subject)


def assert_found(row, outcome, why, remedy):
    assert row.outcome == outcome, row
    assert why in row.why and remedy in row.remedy, row


def raw(value):
    return None if value is None else value.detach().view(torch.uint8).numpy().tobytes() if value.ndim else value.item()


def digest(model):
    """All of a model, and of the random state, that an examination could change."""
    held = [*model.named_parameters(), *model.named_buffers()]
    return dict(
        modules=[(name, id(module), module.training) for name, module in model.named_modules()],
        values=[(name, id(value), value.requires_grad, raw(value)) for name, value in held],
        gradients=[(name, id(value.grad), raw(value.grad)) for name, value in model.named_parameters()],
        hooks=[[list(getattr(module, kind)) for kind in HOOKS] for module in model.modules()],
        switches=[[str(getattr(module, name, None)) for name in SWITCHES] for module in model.modules()],
        adapters=[str(model.active_adapters), str(model.base_model.active_adapter)],
        configs={name: str(vars(config)) for name, config in model.peft_config.items()},
        base=str(model.get_base_model().config),
        generation=str(vars(model.get_base_model()).get("generation_config")),
        targeted=str(model.base_model.targeted_module_names),
        waiting=[module.awaits_start for module in model.modules() if isinstance(module, tucka.routing.Router)],
        random=(torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
    )


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


# --- broken ones -----------------------------------------------------------------------------------------------------


def test_neighbours_that_move_a_route(monkeypatch):
    feature = Dispatcher.feature
    leak = lambda *args, **kwargs: (lambda found: found + found.mean(0))(feature(*args, **kwargs))  # noqa: E731
    monkeypatch.setattr(Dispatcher, "feature", staticmethod(leak))
    row = check("batch invariance", fresh())
    assert_found(row, "fail", "is routed differently alone and in the batch", "set router_module, or router_depth=0")
    assert row.measured > row.tolerance


def test_batches_are_routed_whole_by_design():
    row = check("batch invariance", adapted("bert", routing="batch"))
    assert_found(row, "skipped", "By design a route depends on the whole batch", "use routing='sample'")
    one = {key: value[:1] for key, value in batch_for("bert").items()}
    assert check("batch invariance", adapted("bert"), one).why == "the batch has 1 sample(s); give two or more"


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_padding_that_enters_a_route(monkeypatch, name):
    model = adapted(name)
    assert check("padding invariance", model, batch_for(name)).outcome == "pass"
    monkeypatch.setattr("tucka.units.padding_mask", lambda *args: None)
    row = check("padding invariance", model, batch_for(name))
    assert_found(row, "fail", "4 more columns of padding on the right change the routes by", "see that the attention")


def test_padding_that_enters_by_design():
    row = check("padding invariance", adapted("bert", pool_padding=True))
    assert_found(row, "skipped", "By design padding enters the routes", "use pool_padding=False")


def test_padding_that_no_mask_tells_of():
    model, batch = adapted("gpt2"), batch_for("gpt2")  # row 1 ends in three end tokens
    assert check("padding is masked", model, batch).outcome == "pass"
    without = {key: value for key, value in batch.items() if key != "attention_mask"}
    row = check("padding is masked", model, without)
    assert_found(row, "fail", "1 of 3 samples begin or end with the pad token (2)", "Pass the attention_mask of the")
    ones = dict(batch, attention_mask=torch.ones_like(batch["attention_mask"]))
    assert_found(check("padding is masked", model, ones), "fail", "the attention_mask calls it text", "tokenizer(texts")
    ended = {"input_ids": torch.tensor([[5, 6, 7, 2]])}
    assert check("padding is masked", model, ended).outcome == "pass", "one end token is a legitimate end"


def test_a_route_that_decoding_loses(monkeypatch):
    model = adapted("llama", target_modules="all-linear")
    monkeypatch.setattr(Dispatcher, "_continue", lambda self, scope, module: None)
    row = check("cached generation", model, batch_for("llama"))
    assert_found(row, "fail", "routes differ from the prompt's by", "or pin the route")


def test_a_recomputed_block_with_the_route_of_another_forward(monkeypatch):
    model = adapted("llama", target_modules="all-linear")
    begin, original, last = _Block.__init__, _Block._scope_of_forward, []

    def remember(self, *args):
        begin(self, *args)
        last[:] = [self.scope]

    def latest(self):
        """The routes of whichever forward ran last: right for one forward, wrong for the first of two."""
        scope = original(self)
        return replace(scope, routes={name: last[0].routes[name] for name in scope.routes})

    monkeypatch.setattr(_Block, "__init__", remember)
    monkeypatch.setattr(_Block, "_scope_of_forward", latest)
    row = check("checkpointing", model, batch_for("llama", 6))
    assert_found(row, "fail", "differs by", "gradient_checkpointing_enable(), not by wrapping")
    monkeypatch.setattr(_Block, "_scope_of_forward", lambda self: replace(self.scope, features={}))
    row = check("checkpointing", model, batch_for("llama", 6))
    assert_found(row, "fail", "takes another course when it is recomputed", "not by wrapping its blocks")


def test_reentrant_checkpoints_that_lose_gradients(monkeypatch):
    monkeypatch.setattr(gradients, "_embeddings", lambda model: [])
    model = adapted("llama", target_modules="all-linear")
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        row = check("checkpointing, reentrant", model, batch_for("llama"))
    assert_found(row, "fail", "from that without checkpointing", "{'use_reentrant': False}")
    parameter = next(p for n, p in model.named_parameters() if ".tucka_" in n)
    parameter.register_post_accumulate_grad_hook(lambda p: None)
    assert check("checkpointing, reentrant", model, batch_for("llama")).outcome == "skipped"


def test_files_that_hold_something_else(monkeypatch):
    model, save = adapted("bert"), PeftModel.save_pretrained

    def corrupt(self, directory, **kwargs):
        save(self, directory, **kwargs)
        path = f"{directory}/adapter_model.safetensors"
        tensors = load_file(path)
        key = next(key for key in tensors if key.endswith("core"))
        save_file({**tensors, key: tensors[key] + 1}, path)

    monkeypatch.setattr(PeftModel, "save_pretrained", corrupt)
    row = check("save and reload", model)
    assert_found(row, "fail", "(1 of 46 tensors) are not what the model holds", "Save with model.save_pretrained")


def test_tensors_that_are_loaded_as_something_else(monkeypatch):
    model = adapted("bert")
    shifted = lambda model, name, state: {key: value + (value.ndim > 1) for key, value in state.items()}  # noqa: E731
    monkeypatch.setattr("tucka.model.read_published_weights", shifted)
    before = digest(model)
    row = check("save and reload", model)
    assert_found(row, "fail", "are loaded as something else than the file says", "PeftModel.from_pretrained(base")
    assert digest(model) == before


def test_a_disk_that_is_full(monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError("no space left on device")

    model = adapted("vit")
    monkeypatch.setattr(tucka.TuckAConfig, "save_pretrained", full)
    before = digest(model)
    assert "no space left on device" in check("save and reload", model, batch_for("vit")).why
    assert digest(model) == before


def test_settings_that_are_not_saved():
    model = adapted("bert")
    layers_of(model)[0].tucka_alpha["default"] = 9.0
    row = check("save and reload", model)
    assert_found(row, "fail", "has the same tensors, but its outputs differ by", "whether alpha")


def test_zero_cores_that_are_no_identity():
    model = fresh()
    with torch.no_grad():
        layers_of(model)[1].tucka_experts["default"].input_factor[0, 0] = float("inf")
    row = check("identity at start", model)
    assert_found(row, "fail", "Every core is zero, yet the outputs differ", "see 'finite numbers'")
    row = check("finite numbers", model)
    assert_found(row, "fail", "input_factor of the adapter hold NaN or infinity", "lower learning rate")


def test_layers_that_did_not_move():
    model = fresh()
    with torch.no_grad():
        layers_of(model)[0].tucka_experts["default"].core.add_(1)
    row = check("identity at start", model)
    assert_found(row, "warn", "(10 of 11 layers) are zero, those of the others are not", "gradients arrive")


def test_a_layer_that_does_not_follow_the_switch(monkeypatch):
    model = adapted("bert")
    monkeypatch.setattr(TuckALayer, "disable_adapters", False)
    row = check("disabled adapter", model)
    assert_found(row, "fail", "Under disable_adapter() the outputs differ by", "unwrap it")


def test_biases_that_train():
    model = adapted("bert", bias="tucka_only", target_modules=["query"])
    row = check("disabled adapter", model)
    assert_found(row, "warn", "bias='tucka_only' trains the base model's own biases", "load it anew")
    assert check("what trains", model).outcome == "pass"
    assert check("save and reload", model).outcome == "skipped"


def test_parameters_that_train_and_are_not_saved():
    model = adapted("bert")
    model.get_base_model().classifier.bias.requires_grad_(True)
    model.get_base_model().bert.embeddings.LayerNorm.weight.requires_grad_(True)
    row = check("what trains", model)
    assert_found(row, "fail", "not saved with the adapter: bert.embeddings.LayerNorm.weight", "modules_to_save")


def test_an_adapter_in_half_precision():
    row = check("precision", adapted("bert").to(torch.bfloat16))
    assert_found(row, "warn", "are torch.bfloat16: steps of the optimiser smaller", "autocast_adapter_dtype=True")


def test_a_router_without_a_start():
    model = adapted("bert", calibrate=False)
    row = check("router started", model)
    assert_found(row, "warn", "has seen no data", "tucka.initialize(model, loader)")
    assert check("dead groups", model).why == "the router has not started"


def test_a_group_that_nobody_chooses():
    model = fresh()
    batch = batch_for("bert", 24, padded=False)
    assert check("dead groups", model, batch).outcome == "pass"
    with torch.no_grad():
        router_of(model).centroids[2:] = router_of(model).centroids[:2]  # a tie, which the first group wins
    row = check("dead groups", model, batch)
    assert_found(row, "fail", "samples per group 24, 0: a group that takes (almost) no sample", "tucka.revive(model")
    row = check("dead groups", model, batch_for("bert", 6))
    assert row.outcome == "skipped" and "probability 0.18; give 11 samples or more" in row.why


def test_too_few_samples_are_said_to_be_too_few():
    for groups in (2, 4, 16):
        needed = samples_needed(groups)
        assert chance_of_empty(groups, needed) <= 0.05 < chance_of_empty(groups, needed - 1)


def test_outputs_that_are_not_finite():
    model = adapted("bert")
    model.get_base_model().classifier.bias.data[0] = float("inf")
    row = check("forward and routes", model)
    assert_found(row, "fail", "output on this batch holds NaN or infinity", "overflow in float16")


class Pair(nn.Module):
    """Two pretrained models, of which a batch of texts runs one."""

    def __init__(self):
        super().__init__()
        self.text, self.image = build("bert").bert, build("vit").vit

    def forward(self, input_ids, attention_mask=None):
        return self.text(input_ids, attention_mask).last_hidden_state


def test_a_tower_that_does_not_run():
    model = randomise(
        tucka.apply(Pair(), plain_config(r=2, k=2, target_modules=["query", "q_proj", "attention.query"]))
    )
    assert len(tucka.model.dispatchers_of(model)) == 2
    row = check("forward and routes", model, text_batch())
    assert_found(row, "warn", "No adapted layer of image ran", "exclude_modules")
    row = check("gradients arrive", model, text_batch())
    assert_found(row, "warn", "does not depend on image.", "exclude_modules")


@pytest.mark.parametrize(("factor", "outcome", "why"), [(0.0, "warn", "is exactly zero"), (1e99, "fail", "holds NaN")])
def test_gradients_that_move_nothing_or_everything(factor, outcome, why):
    model = adapted("bert")
    layers_of(model)[2].tucka_experts["default"].core.register_hook(lambda gradient: gradient * factor)
    row = check("gradients arrive", model)
    assert row.outcome == outcome and why in row.why and "core" in row.why and row.remedy


def test_a_router_that_gets_no_gradient():
    row = check("gradients arrive", adapted("bert", t=1, affinity="paper"))
    assert_found(row, "warn", "a gate is the sign of a logit", "Use t=2 or more")
    alone = dict(k=1, t=1, p=1, affinity="cosine", init_router="kmeans", shared_expert=False)
    assert check("gradients arrive", adapted("bert", **alone)).outcome == "pass", "LoRA's case has nothing to route"
    alone.update(normalize="bounded", shared_expert=True)
    assert check("gradients arrive", adapted("bert", **alone)).outcome == "pass", "one normalised number is a constant"


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
