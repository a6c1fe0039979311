"""What the self-check says of broken models: why a line fails, and what to do."""

from dataclasses import replace

import pytest
import torch
from conftest import adapted, batch_for, build, plain_config, randomise, router_of, text_batch
from doctor_bench import assert_found, check, digest, fresh
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import tucka
from tucka.checkpointing import _Block
from tucka.diagnosis import gradients
from tucka.diagnosis.loads import chance_of_empty, samples_needed
from tucka.dispatch import Dispatcher
from tucka.layer import TuckALayer
from tucka.model import layers_of


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
