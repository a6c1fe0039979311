"""What users of Hugging Face PEFT expect of any method: wrapping, injecting, targets, removing."""

import copy

import peft
import pytest
import torch
import transformers as tf
from conftest import (
    adapted,
    assert_same_tensors,
    batch_for,
    build,
    plain_config,
    randomise,
    stored,
)
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft_surface import (
    PARAMETERS,
    QUERY,
    QUERY_VALUE,
    SIZES,
    VALUE,
    adapted_layers,
    bert,
    bert_config,
    layers,
    outputs,
    reloaded,
    trainable,
)

import tucka


class TestWrapping:
    """get_peft_model and what it tells about the model."""

    @pytest.mark.parametrize(
        "name,task,kind",
        [
            ("bert", "SEQ_CLS", peft.PeftModelForSequenceClassification),
            ("bert", None, PeftModel),
            ("llama", "CAUSAL_LM", peft.PeftModelForCausalLM),
            ("gpt2", "CAUSAL_LM", peft.PeftModelForCausalLM),
        ],
    )
    def test_get_peft_model_gives_what_apply_gives(self, name, task, kind):
        found = []
        for function in (get_peft_model, tucka.apply):
            torch.manual_seed(0)
            found.append(function(build(name), plain_config(**SIZES, task_type=task)))
        assert type(found[0]) is type(found[1]) is kind
        assert found[0].peft_type == "TUCKA" and found[0].active_adapter == "default"
        assert_same_tensors(found[0].state_dict(), found[1].state_dict())
        assert trainable(found[0]) == trainable(found[1])

    def test_parameters_are_counted(self, capsys):
        model = get_peft_model(build("bert"), bert_config())
        total = sum(parameter.numel() for parameter in model.parameters())
        assert model.get_nb_trainable_parameters() == (PARAMETERS, total)
        model.print_trainable_parameters()
        printed = capsys.readouterr().out
        assert printed.startswith(f"trainable params: {PARAMETERS:,d} || all params: {total:,d} || trainable%: ")

    def test_layer_status(self):
        model = get_peft_model(build("bert"), bert_config())
        model.add_adapter("other", bert_config(target_modules=["value"]))
        status = {status.name: status for status in model.get_layer_status()}
        assert status.keys() == {f"model.{name}" for name in layers(QUERY, VALUE)}
        for name, layer in status.items():
            expected = ["default", "other"] if name.endswith("value") else ["default"]
            assert layer.module_type == "tucka.TuckALayer"
            assert layer.available_adapters == expected and layer.devices == {adapter: ["cpu"] for adapter in expected}
            assert layer.requires_grad == {adapter: adapter == "default" for adapter in expected}
            assert (layer.enabled, layer.active_adapters, layer.merged_adapters) == (True, ["default"], [])

    def test_model_status(self):
        model = get_peft_model(build("bert"), bert_config())
        model.add_adapter("other", bert_config(r=2))
        status = model.get_model_status()
        assert (status.base_model_type, status.adapter_model_type) == ("BertForSequenceClassification", "TuckAModel")
        assert status.peft_types == {"default": "TUCKA", "other": "TUCKA"}
        assert (status.trainable_params, status.num_adapter_layers) == (PARAMETERS, 4)
        assert status.total_params == sum(parameter.numel() for parameter in model.parameters())
        assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
        assert status.available_adapters == ["default", "other"]
        assert status.requires_grad == {"default": True, "other": False} and status.devices["other"] == ["cpu"]
        model.base_model.disable_adapter_layers()
        assert model.get_model_status().enabled is False

    def test_the_configuration_survives_its_file(self, tmp_path):
        fields = dict(rank_pattern={"query": 2}, exclude_modules=["pooler.dense"], routing="batch", alpha=0.5)
        config = plain_config(**fields, target_modules=["query", "dense"])
        config.save_pretrained(tmp_path)
        assert peft.PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
        assert isinstance(peft.PeftConfig.from_pretrained(tmp_path), tucka.TuckAConfig)
        assert peft.get_peft_config(config.to_dict()).to_dict() == config.to_dict()

    def test_meta_parameters_on_request(self):
        model = get_peft_model(build("bert"), bert_config(), low_cpu_mem_usage=True)
        devices = {p.device.type for name, p in model.named_parameters() if ".tucka_" in name}
        assert devices == {"meta"}
        set_peft_model_state_dict(model, stored(bert()), low_cpu_mem_usage=True)
        assert torch.equal(outputs(model.eval()), outputs(bert()))


class TestInjection:
    """Adapters inside a model that PeftModel does not wrap."""

    def test_inject_adapter_in_model(self):
        model = bert()
        plain = peft.inject_adapter_in_model(bert_config(), build("bert")).eval()
        assert type(plain) is tf.BertForSequenceClassification
        assert torch.equal(outputs(plain), outputs(build("bert")))
        assert trainable(plain) == {name.removeprefix("base_model.model.") for name in trainable(model)}
        result = set_peft_model_state_dict(plain, stored(model))
        assert not result.unexpected_keys
        assert torch.equal(outputs(plain), outputs(model))
        without_prefix = {key.removeprefix("base_model.model."): value for key, value in stored(model).items()}
        assert_same_tensors(stored(plain), without_prefix)
        another = peft.inject_adapter_in_model(bert_config(), build("bert")).eval()
        set_peft_model_state_dict(another, stored(plain))
        assert torch.equal(outputs(another), outputs(model))

    def test_a_state_dict_says_which_layers_to_adapt(self):
        state = {key.removeprefix("base_model.model."): value for key, value in stored(bert()).items()}
        config = bert_config(target_modules=["query", "value", "key"])
        with pytest.warns(RuntimeWarning, match="The PEFT config contained these additional target modules"):
            plain = peft.inject_adapter_in_model(config, build("bert"), state_dict=state)
        assert adapted_layers(plain) == layers(QUERY, VALUE)

    def test_the_methods_that_transformers_has(self):
        model = build("bert")
        model.add_adapter(bert_config(), "first")
        model.add_adapter(bert_config(r=2, k=2), "second")
        assert model.active_adapters() == ["second"]
        model.train()(**batch_for("bert"))  # starts the router
        randomise(model).eval()
        second = outputs(model)
        model.set_adapter("first")
        assert torch.equal(outputs(model), outputs(build("bert"))) and not torch.equal(second, outputs(model))
        model.set_adapter("second")
        assert torch.equal(outputs(model), second)
        model.disable_adapters()
        assert torch.equal(outputs(model), outputs(build("bert")))
        model.enable_adapters()
        assert torch.equal(outputs(model), second)
        model.delete_adapter("first")
        assert torch.equal(outputs(model), second) and list(model.peft_config) == ["second"]

    @pytest.mark.parametrize("name", ["bert", "llama"])
    def test_transformers_loads_a_saved_adapter(self, name, tmp_path):
        source, batch = adapted(name).eval(), batch_for(name)
        source.save_pretrained(tmp_path)
        model = build(name)
        model.load_adapter(str(tmp_path), adapter_name="mine", is_trainable=True)
        expected = {key.removeprefix("base_model.model."): value for key, value in stored(source).items()}
        assert_same_tensors(stored(model, "mine"), expected)
        assert torch.equal(outputs(model.eval(), batch), outputs(source, batch))

    @pytest.mark.parametrize("name", ["bert", "llama"])
    def test_an_adapter_that_transformers_loaded_does_not_start_again(self, name, tmp_path):
        """Its first training batch must leave the trained router as it is."""
        adapted(name).save_pretrained(tmp_path)
        model, batch = build(name), batch_for(name)
        model.load_adapter(str(tmp_path), is_trainable=True)
        before = stored(model)
        model.train()(**batch).loss.backward()
        assert_same_tensors(stored(model), before)

    def test_what_transformers_saves(self, tmp_path):
        model = build("bert")
        model.add_adapter(bert_config())
        model.train()(**batch_for("bert"))
        randomise(model).eval().save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert torch.equal(outputs(PeftModel.from_pretrained(build("bert"), tmp_path)), outputs(model))


class TestTargets:
    """Which layers are adapted, by PEFT's rules."""

    @pytest.mark.parametrize(
        "fields,expected",
        [
            (
                dict(target_modules=["query", "layer.1.attention.self.value"]),
                layers(QUERY) | layers(VALUE, indices=[1]),
            ),
            (dict(target_modules=r".*\.layer\.0\..*\.(query|value)"), layers(QUERY, VALUE, indices=[0])),
            (dict(target_modules=["query"], layers_to_transform=[1]), layers(QUERY, indices=[1])),
            (dict(target_modules=["query"], layers_to_transform=0), layers(QUERY, indices=[0])),
            (
                dict(target_modules=["query", "value"], layers_to_transform=[1], layers_pattern="layer"),
                layers(QUERY, VALUE, indices=[1]),
            ),
            (dict(target_modules=QUERY_VALUE, exclude_modules=["value"]), layers(QUERY)),
            (dict(target_modules=QUERY_VALUE, exclude_modules=r".*layer\.0.*"), layers(QUERY, VALUE, indices=[1])),
            (
                dict(target_modules="all-linear", exclude_modules=["classifier", "pooler.dense"]),
                layers(QUERY, VALUE, "attention.self.key", "attention.output.dense")
                | layers("intermediate.dense", "output.dense"),
            ),
            (
                dict(target_modules="all-linear", task_type="SEQ_CLS"),
                layers(QUERY, VALUE, "attention.self.key", "attention.output.dense")
                | layers("intermediate.dense", "output.dense")
                | {"bert.pooler.dense"},
            ),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_selection(self, fields, expected, tmp_path):
        model = adapted("bert", r=2, **fields).eval()
        found = {name for name in adapted_layers(model) if name != "classifier"}
        assert found == expected
        assert adapted_layers(reloaded(model, tmp_path)) == adapted_layers(model)

    @pytest.mark.parametrize(
        "name,kinds",
        [
            ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
            ("gpt2", ["c_attn", "c_proj", "c_fc"]),
        ],
    )
    def test_all_linear_leaves_the_output_head_alone(self, name, kinds):
        model = get_peft_model(build(name), plain_config(r=2, target_modules="all-linear"))
        assert {layer.rpartition(".")[2] for layer in adapted_layers(model)} == set(kinds)

    def test_ranks_of_single_layers(self, tmp_path):
        pattern = {r"layer\.0\.attention\.self\.query": 2, "value": 6}
        model = bert(rank_pattern=pattern)
        state = stored(reloaded(model, tmp_path))
        ranks = {
            key.split(".tucka_")[0]: value.shape[1] for key, value in state.items() if key.endswith("input_factor")
        }
        names = {name.removeprefix("base_model.model.bert.encoder.layer."): rank for name, rank in ranks.items()}
        assert names == {f"0.{QUERY}": 2, f"1.{QUERY}": 4, f"0.{VALUE}": 6, f"1.{VALUE}": 6}

    def test_a_pattern_that_matches_nothing_warns(self):
        with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match .*ignored: \['kery'\]"):
            get_peft_model(build("bert"), bert_config(rank_pattern={"kery": 2}))

    def test_targets_that_match_nothing_are_refused(self):
        with pytest.raises(ValueError, match=r"Target modules \{'kery'\} not found in the base model"):
            get_peft_model(build("bert"), bert_config(target_modules=["kery"]))


class TestRemoval:
    """unload gives the base back; merging without a route is refused."""

    @staticmethod
    def used(model, name):
        """Put a model through what leaves traces: training with checkpointing, generation."""
        batch = batch_for(name)
        model.train()
        if name != "clip":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch).loss.backward()
        model.zero_grad()
        if name != "clip":
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        model.eval()
        if name in ("llama", "gpt2", "t5"):
            model.generate(input_ids=batch["input_ids"][:1], max_new_tokens=2)
        return model

    @staticmethod
    def anatomy(model):
        """Every module's class, instance attributes and hooks."""
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        hooks += ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
        found = {}
        for name, module in model.named_modules():
            assert not any(vars(module)[hook] for hook in hooks if hook in vars(module)), name
            found[name] = (type(module), set(vars(module)))
        return found

    @pytest.mark.parametrize("name", ["bert", "deberta", "gpt2", "llama", "t5", "clip"])
    def test_unload_gives_the_base_back(self, name):
        reference, batch = self.used(build(name), name), batch_for(name)
        model = self.used(adapted(name, target_modules="all-linear"), name)
        model.add_adapter("other", plain_config(r=2))
        base = model.unload()
        assert type(base) is type(reference)
        assert self.anatomy(base) == self.anatomy(reference)
        assert_same_tensors(base.state_dict(), reference.state_dict())
        assert torch.equal(outputs(base, batch), outputs(reference, batch))

        again = tucka.apply(base, plain_config(**SIZES), calibration=[batch])
        assert torch.equal(outputs(again, batch), outputs(reference, batch))
        with tucka.record_routes(again) as routes:
            assert not torch.equal(outputs(randomise(again), batch), outputs(reference, batch))
        assert len(routes) == (1 if isinstance(routes, list) else 2)
        assert torch.equal(outputs(again.unload(), batch), outputs(reference, batch))

    def test_unload_after_the_only_adapter_is_deleted(self):
        model = bert()
        model.delete_adapter("default")
        assert self.anatomy(model.unload()) == self.anatomy(build("bert"))

    @pytest.mark.parametrize("name", ["bert", "llama"])
    @pytest.mark.parametrize(
        "merge",
        [
            lambda model: model.merge_and_unload(),
            lambda model: model.merge_and_unload(safe_merge=True, adapter_names=["default"]),
            lambda model: model.merge_adapter(),
            lambda model: model.merge_adapter(["default"]),
        ],
        ids=["merge_and_unload", "safe", "merge_adapter", "named"],
    )
    def test_merging_without_a_route_is_refused_and_changes_nothing(self, name, merge):
        model, batch = adapted(name).eval(), batch_for(name)
        before, state = outputs(model, batch), copy.deepcopy(model.state_dict())
        message = r"cannot be merged( in place)?: the update depends on the route of each forward.* merge_and_unload\("
        with pytest.raises(ValueError, match=message):
            merge(model)
        assert_same_tensors(model.state_dict(), state)
        assert torch.equal(outputs(model, batch), before)
        assert model.get_model_status().merged_adapters == []
        model.unmerge_adapter()
        assert torch.equal(outputs(model, batch), before)
