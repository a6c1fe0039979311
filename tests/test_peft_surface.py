"""What users of Hugging Face PEFT expect of any method, on tiny models."""

import copy
import io
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from conftest import (
    adapted,
    assert_same_tensors,
    batch_for,
    build,
    first_output,
    plain_config,
    randomise,
    stored,
)
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

import tucka

QUERY, VALUE = "attention.self.query", "attention.self.value"
QUERY_VALUE = ["query", "value"]
SIZES = dict(r=4, k=3, t=2, p=2)

PARAMETERS = 4 * (32 * 4 + 3 * 2 * 4 * 4 + 2 * 2 + 4 * 4) + 3 * 2 * 2 * 32
"""In each of four layers D·R + K·P·R² + T·P + R² (the always-active slice); once K·T·2D (mean and deviation)."""


def bert_config(**fields):
    return plain_config(**{**SIZES, "target_modules": QUERY_VALUE, **fields})


def bert(**fields):
    """A tiny BERT with a started and randomised adapter on its queries and values, each time the same."""
    torch.manual_seed(0)
    return adapted("bert", **{**SIZES, "target_modules": QUERY_VALUE, **fields}).eval()


def outputs(model, batch=None):
    with torch.no_grad():
        return first_output(model(**(batch_for("bert") if batch is None else batch)))


def reloaded(model, directory, **options):
    """The adapter, saved and loaded on a fresh copy of its base; checked to be the same."""
    model.eval().save_pretrained(directory)
    again = PeftModel.from_pretrained(build("bert"), directory, **options).eval()
    assert_same_tensors(stored(again), stored(model))
    assert torch.equal(outputs(again), outputs(model))
    return again


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted_layers(model):
    """Names of the adapted layers, as PEFT tells them."""
    return {status.name.removeprefix("model.") for status in peft.get_layer_status(model)}


def layers(*kinds, indices=(0, 1)):
    return {f"bert.encoder.layer.{index}.{kind}" for index in indices for kind in kinds}


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


class TestAdapters:
    """Several adapters on one model."""

    def two(self):
        model = bert()
        model.add_adapter("other", bert_config(r=2, k=2, t=3, target_modules=["value", "key"]))
        model.set_adapter("other")
        model.train()(**batch_for("bert"))  # starts its router
        return randomise(model, seed=5).eval()

    def test_two_threads_may_run_one_model(self):
        """Each forward is routed by its own batch, even while another one is under way."""
        model = bert()
        batches = [batch_for("bert"), batch_for("bert", positions=6, padded=False)]
        expected = [outputs(model, batch) for batch in batches]
        assert not torch.equal(*expected)
        meeting = threading.Barrier(2)  # both are inside of the model before either goes on

        def meet(module, args):
            meeting.wait(20)

        model.get_base_model().bert.encoder.layer[1].register_forward_pre_hook(meet)
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(outputs, [model, model], batches))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])

    def test_a_new_adapter_is_inactive_and_frozen(self):
        model = bert()
        before, flags = outputs(model), trainable(model)
        model.add_adapter("other", bert_config(init_experts="kaiming"))
        assert model.active_adapter == "default" and trainable(model) == flags
        assert torch.equal(outputs(model), before)

    def test_adapters_with_other_targets(self):
        model = self.two()
        other = outputs(model)
        model.set_adapter("default")
        assert torch.equal(outputs(model), outputs(bert())) and not torch.equal(outputs(model), other)
        assert trainable(model) == trainable(bert())
        model.set_adapter("other")
        assert torch.equal(outputs(model), other)
        model.delete_adapter("default")
        assert torch.equal(outputs(model), other) and adapted_layers(model) >= layers(VALUE, "attention.self.key")
        assert {key for key in trainable(model) if ".other." not in key} == set()

    def test_a_deleted_name_can_be_used_again(self):
        model = self.two()
        model.delete_adapter("default")
        with tucka.record_routes(model) as routes:
            expected = outputs(model)
        with tucka.pin_route(model, routes[0]):  # the deleted adapter has no say in what fits
            assert torch.equal(outputs(model), expected)
        model.add_adapter("default", bert_config(r=3))
        model.set_adapter("default")
        assert torch.equal(outputs(model), outputs(build("bert")))
        set_peft_model_state_dict(model, stored(bert(r=3)))
        assert torch.equal(outputs(model), outputs(bert(r=3)))

    def test_set_adapter_for_inference_freezes(self):
        model = bert()
        model.set_adapter("default", inference_mode=True)
        assert not trainable(model)
        model.set_requires_grad("default", True)
        assert trainable(model) == trainable(bert())

    def test_two_active_adapters_add_their_updates(self):
        model = bert()
        model.add_adapter("nothing", bert_config(r=2))
        model.base_model.set_adapter(["default", "nothing"])
        assert torch.equal(outputs(model), outputs(bert()))
        model = self.two()
        model.base_model.set_adapter(["default", "other"])
        both = outputs(model)
        assert {key.split(".tucka_")[1].split(".")[1] for key in trainable(model)} == {"default", "other"}
        for name in ("default", "other"):
            model.set_adapter(name)
            assert not torch.equal(outputs(model), both)

    def test_routes_of_one_of_several_adapters_are_recorded_and_replayed(self):
        model = self.two()
        for name, scores in (("default", (3, 3, 2)), ("other", (3, 2, 3))):
            model.set_adapter(name)
            expected = outputs(model)
            with tucka.record_routes(model) as routes:
                outputs(model)
            assert [route.scores.shape for route in routes] == [scores]
            with tucka.pin_route(model, routes[0]):
                assert torch.equal(outputs(model), expected)

    def test_an_inactive_adapter_starts_from_data(self):
        model = get_peft_model(build("bert"), bert_config())
        before = stored(model)
        model.add_adapter("other", bert_config())
        tucka.initialize(model, [batch_for("bert")], "other")
        flags = [bool(flag) for key, flag in stored(model, "other").items() if key.endswith("initialised")]
        assert flags == [True]
        assert_same_tensors(stored(model), before)
        assert model.active_adapters == ["default"]

    def test_load_adapter(self, tmp_path):
        source = self.two()
        source.save_pretrained(tmp_path)
        model = bert(r=2)
        result = model.load_adapter(tmp_path / "other", adapter_name="loaded")
        assert not result.missing_keys and not result.unexpected_keys
        assert model.active_adapter == "default" and torch.equal(outputs(model), outputs(bert(r=2)))
        assert not {key for key in trainable(model) if ".loaded." in key}
        model.set_adapter("loaded")
        assert_same_tensors(stored(model, "loaded"), stored(source, "other"))
        assert torch.equal(outputs(model), outputs(source))

    def test_loading_over_an_adapter_keeps_its_parameters(self, tmp_path):
        """As the Trainer does for its best checkpoint: an optimiser holds the parameters."""
        randomise(bert(), seed=7).save_pretrained(tmp_path)
        model = bert()
        held = dict(model.named_parameters())
        model.load_adapter(tmp_path, "default", is_trainable=True)
        assert all(held[name] is parameter for name, parameter in model.named_parameters())
        assert torch.equal(outputs(model.eval()), outputs(randomise(bert(), seed=7)))

    @pytest.mark.parametrize(
        "act,message",
        [
            (lambda model: model.add_adapter("default", bert_config()), "Adapter with name 'default' already exists"),
            (lambda model: model.add_adapter("lora", peft.LoraConfig()), "Cannot combine adapters with different peft"),
            (lambda model: model.set_adapter("missing"), "Adapter missing not found"),
            (lambda model: model.delete_adapter("missing"), "Adapter missing does not exist"),
            (lambda model: model.save_pretrained("x", selected_adapters=["missing"]), "invalid `selected_adapters`"),
        ],
        ids=["add twice", "add another method", "set", "delete", "save"],
    )
    def test_what_cannot_be_done_says_so_and_changes_nothing(self, act, message):
        model = bert()
        before = stored(model)
        with pytest.raises(ValueError, match=re.escape(message)):
            act(model)
        assert_same_tensors(stored(model), before)
        assert list(model.peft_config) == ["default"] and torch.equal(outputs(model), outputs(bert()))


class TestStateDict:
    """get_peft_model_state_dict and set_peft_model_state_dict."""

    def test_keys_and_shapes(self):
        expected = {}
        for layer in layers(QUERY, VALUE):
            prefix = f"base_model.model.{layer}.tucka_experts."
            shapes = dict(core=(3, 2, 4, 4), expert_factor=(2, 2), input_factor=(32, 4), shared_core=(4, 4))
            expected |= {prefix + end: shape for end, shape in shapes.items()}
        router = f"base_model.model.bert.encoder.layer.0.{QUERY}.tucka_router."
        expected |= {router + "centroids": (6, 64), router + "initialised": ()}
        assert {key: tuple(value.shape) for key, value in stored(bert()).items()} == expected

    @pytest.mark.parametrize("adapter_name", ["default", "query", "tucka"])
    def test_any_name(self, adapter_name):
        source, expected = bert(), outputs(bert())
        model = get_peft_model(build("bert"), bert_config(), adapter_name=adapter_name)
        result = set_peft_model_state_dict(model, stored(source), adapter_name=adapter_name)
        assert not result.unexpected_keys and torch.equal(outputs(model.eval()), expected)
        assert_same_tensors(stored(model, adapter_name), stored(source))

    @pytest.mark.parametrize("adapter_name", ["core", "centroids"])
    def test_an_adapter_named_like_a_tensor_is_refused(self, adapter_name):
        """PEFT would take its neighbour's tensors of that name for its own."""
        model, expected = bert(), stored(bert())
        with pytest.raises(ValueError, match=f"an adapter cannot be called '{adapter_name}'"):
            model.add_adapter(adapter_name, bert_config())
        assert_same_tensors(stored(model), expected)

    def test_values_are_copied_in(self):
        model, state = bert(), stored(bert())
        set_peft_model_state_dict(model, {key: torch.zeros_like(value) for key, value in state.items()})
        assert torch.equal(outputs(model), outputs(build("bert")))
        assert not any(value.any() for value in stored(model).values())

    def test_the_whole_models_state_dict_too(self):
        model, other = bert(), randomise(bert(), seed=8)
        model.load_state_dict(other.state_dict())
        assert torch.equal(outputs(model), outputs(other))


class TestFiles:
    """Files, and models put together from them."""

    def test_what_push_to_hub_sends(self, monkeypatch):
        sent = {}

        class Hub:
            """Takes what a client would upload."""

            def create_repo(self, repo_id, **options):
                return type("Url", (), {"repo_id": repo_id})

            def create_commit(self, repo_id, operations, **options):
                sent.update({file.path_in_repo: Path(file.path_or_fileobj).read_bytes() for file in operations})

        monkeypatch.setattr(tf.utils.hub, "hf_api", Hub)
        card = peft.peft_model.ModelCard("---\nlibrary_name: peft\n---\n")
        monkeypatch.setattr(tf.utils.hub, "create_and_tag_model_card", lambda *args, **kwargs: card)
        model = bert()
        model.push_to_hub("someone/adapter")
        assert set(sent) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        config = json.loads(sent["adapter_config.json"])
        assert (config["peft_type"], config["format_version"]) == ("TUCKA", 1)
        assert (config["r"], config["k"], config["inference_mode"]) == (4, 3, True)
        assert sorted(config["target_modules"]) == QUERY_VALUE

    def test_files_on_disk(self, tmp_path):
        model = bert()
        model.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "README.md",
        }
        assert_same_tensors(load_file(tmp_path / "adapter_model.safetensors"), stored(model))
        assert json.loads((tmp_path / "adapter_config.json").read_text())["format_version"] == 1
        assert "library_name: peft" in (tmp_path / "README.md").read_text()
        assert not model.peft_config["default"].inference_mode

    @pytest.mark.parametrize(
        "name,task,auto",
        [
            ("llama", "CAUSAL_LM", peft.AutoPeftModelForCausalLM),
            ("gpt2", "CAUSAL_LM", peft.AutoPeftModelForCausalLM),
            ("bert", "SEQ_CLS", peft.AutoPeftModelForSequenceClassification),
            ("bert", None, peft.AutoPeftModel),
        ],
    )
    def test_auto_classes_put_base_and_adapter_together(self, name, task, auto, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        build(name).save_pretrained(tmp_path / "base")
        base = type(build(name)).from_pretrained(tmp_path / "base")
        model = randomise(tucka.apply(base, plain_config(**SIZES, task_type=task), calibration=[batch_for(name)]))
        model.eval().save_pretrained(tmp_path / "adapter")
        again = auto.from_pretrained(tmp_path / "adapter")
        assert type(again) is type(model)
        assert_same_tensors(stored(again), stored(model))
        assert torch.equal(outputs(again, batch_for(name)), outputs(model, batch_for(name)))
        by_transformers = type(build(name)).from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(outputs(by_transformers, batch_for(name)), outputs(model, batch_for(name)))

    def test_modules_to_save_are_trained_saved_and_switched(self, tmp_path):
        model = bert(modules_to_save=["classifier"])
        head = "base_model.model.classifier.modules_to_save.default.weight"
        original = build("bert").classifier.weight
        assert head in trainable(model) and not torch.equal(model.state_dict()[head], original)
        assert torch.equal(stored(model)["base_model.model.classifier.weight"], model.state_dict()[head])
        again = reloaded(model, tmp_path)
        with again.disable_adapter():
            assert torch.equal(outputs(again), outputs(build("bert")))
        again.add_adapter("plain", bert_config())
        again.set_adapter("plain")
        assert torch.equal(outputs(again), outputs(build("bert")))
        again.set_adapter("default")
        assert torch.equal(outputs(again), outputs(model))

    def test_names_that_begin_as_our_keys_do(self, tmp_path):
        """A head saved under such a name is still a head."""
        model = bert(modules_to_save=["classifier"])
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(build("bert"), tmp_path, adapter_name="tucka_news").eval()
        assert torch.equal(outputs(again), outputs(model))
        again.save_pretrained(tmp_path / "named")
        named = PeftModel.from_pretrained(build("bert"), tmp_path / "named" / "tucka_news").eval()
        assert torch.equal(outputs(named), outputs(model))

    @pytest.mark.parametrize("where", ["embed_tokens", "lm_head"])
    def test_modules_to_save_of_a_generating_model(self, where, tmp_path):
        model = adapted("llama", modules_to_save=[where]).eval()
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(build("llama"), tmp_path)
        assert_same_tensors(stored(again), stored(model))
        batch = batch_for("llama", left=True)
        batch.pop("labels")
        assert torch.equal(outputs(again, batch), outputs(model, batch))
        options = dict(max_new_tokens=5, min_new_tokens=5)
        assert torch.equal(again.generate(**batch, **options), model.generate(**batch, **options))

    def test_resized_embeddings_are_saved_on_request(self, tmp_path):
        def base():
            model = build("llama")
            model.resize_token_embeddings(56)
            return model

        batch = batch_for("llama")
        model = tucka.apply(base(), plain_config(**SIZES), calibration=[batch])
        torch.nn.init.normal_(randomise(model).eval().get_input_embeddings().weight)
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        assert torch.equal(outputs(PeftModel.from_pretrained(base(), tmp_path), batch), outputs(model, batch))

    def test_a_saved_module_is_not_adapted(self, tmp_path):
        model = bert(target_modules="all-linear", modules_to_save=["pooler", "classifier"])
        assert not {name for name in adapted_layers(model) if name.startswith("bert.pooler.dense")}
        assert any(".pooler.modules_to_save." in name for name in trainable(model))
        reloaded(model, tmp_path)

    @pytest.mark.parametrize("bias", ["all", "tucka_only"])
    def test_biases_are_trained_saved_and_reloaded(self, bias, tmp_path):
        model = bert(bias=bias)
        biases = {name for name in trainable(model) if name.endswith(".bias")}
        every = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
        of_targets = {f"base_model.model.{layer}.base_layer.bias" for layer in layers(QUERY, VALUE)}
        assert biases == (every if bias == "all" else of_targets)
        base = {name: value for name, value in build("bert").state_dict().items() if name.endswith("query.bias")}
        state = stored(model)
        for name, value in base.items():
            assert not torch.equal(state["base_model.model." + name.replace("query", "query.base_layer")], value)
        assert {key for key in state if ".tucka_" not in key} == biases
        reloaded(model, tmp_path)

    def test_one_adapter_with_biases_at_a_time(self):
        model = bert(bias="all")
        with pytest.raises(ValueError, match="TuckAModel supports only 1 adapter with bias"):
            model.add_adapter("other", bert_config(bias="tucka_only"))
        assert list(model.peft_config) == ["default"]

    def test_shared_factors_are_stored_once(self, tmp_path):
        model = bert(share_factors=True, form="additive")
        state = stored(reloaded(model, tmp_path, low_cpu_mem_usage=True))
        ends = [key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")]
        assert {end: ends.count(end) for end in set(ends)} == dict(
            core=4, expert_factor=4, shared_core=4, input_factor=2, output_factor=2, centroids=1, initialised=1
        )
        owners = {key.split(".tucka_")[0] for key in state if key.endswith("input_factor")}
        assert owners == {f"base_model.model.{layer}" for layer in layers(QUERY, VALUE, indices=[0])}

    def test_shared_factors_train_together(self):
        model = bert(share_factors=True)
        owner = next(
            p for name, p in model.named_parameters() if name.endswith(f"0.{QUERY}.tucka_experts.default.input_factor")
        )
        before = outputs(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if f"0.{QUERY}.tucka_experts" in name and name.endswith("core"):
                    parameter.zero_()
            silenced = outputs(model)
            owner.zero_()
        assert not torch.equal(silenced, before) and not torch.equal(outputs(model), silenced)

    def test_untied_factors(self, tmp_path):
        model = bert(tie_factors=False)
        state = stored(reloaded(model, tmp_path))
        outs = [value for key, value in state.items() if key.endswith("output_factor")]
        assert [tuple(value.shape) for value in outs] == [(32, 4)] * 4
        assert not any(key.endswith("output_factor") for key in stored(bert()))

    @pytest.mark.parametrize("shared_expert", [True, False])
    def test_the_shared_expert(self, shared_expert, tmp_path):
        model = bert(shared_expert=shared_expert)
        state = stored(reloaded(model, tmp_path))
        assert sum(key.endswith("shared_core") for key in state) == (4 if shared_expert else 0)

    @pytest.mark.parametrize("share_factors", [True, False])
    def test_core_only_training_holds_the_factors_whatever_is_switched(self, share_factors, tmp_path):
        model = bert(trainable="core", share_factors=share_factors)
        model.add_adapter("other", bert_config(trainable="core"))

        def check():
            ends = {name.rpartition(".")[2] for name in trainable(model)}
            assert ends == {"core", "shared_core", "expert_factor", "centroids"}
            assert all(f".{model.active_adapter}." in name for name in trainable(model))

        check()
        for name in ("other", "default"):
            model.set_adapter(name)
            check()
        with model.disable_adapter():
            assert not trainable(model)
        check()
        model.set_requires_grad("default", True)
        check()
        before = stored(model)
        model.train()(**batch_for("bert")).loss.backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        same = {key for key, value in stored(model).items() if torch.equal(value, before[key])}
        factors = {key for key in before if key.endswith("input_factor")}
        assert len(factors) == (2 if share_factors else 4)
        assert same == factors | {key for key in before if key.endswith("initialised")}
        model.delete_adapter("other")
        loaded = reloaded(model, tmp_path, is_trainable=True)
        assert trainable(loaded) == trainable(model)


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


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class TestCopies:
    """Deep copies and pickles of whole models."""

    @pytest.mark.parametrize("fields", [{}, dict(share_factors=True, trainable="core", target_modules="all-linear")])
    @pytest.mark.parametrize("name", ["bert", "deberta", "llama", "clip"])
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
    def test_a_copy_is_independent(self, duplicate, name, fields):
        model, batch = adapted(name, **fields).eval(), batch_for(name)
        before, state = outputs(model, batch), stored(model)
        twin = duplicate(model)
        assert_same_tensors(stored(twin), state)
        assert torch.equal(outputs(twin, batch), before)

        randomise(twin, seed=4)
        changed = outputs(twin, batch)
        assert not torch.equal(changed, before) and torch.equal(outputs(model, batch), before)
        assert_same_tensors(stored(model), state)
        with tucka.record_routes(model) as mine, tucka.record_routes(twin) as its:
            outputs(twin, batch)
        counts = [[len(r) for r in ([found] if isinstance(found, list) else found.values())] for found in (mine, its)]
        assert set(counts[0]) == {0} and set(counts[1]) == {1}

        assert torch.equal(outputs(twin.unload(), batch), outputs(build(name), batch))
        assert torch.equal(outputs(model, batch), before)
        assert torch.equal(outputs(model.unload(), batch), outputs(build(name), batch))

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
    def test_a_copy_trains_and_generates_on_its_own(self, duplicate):
        model, batch = adapted("llama").eval(), batch_for("llama", left=True)
        prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
        options = dict(max_new_tokens=5, min_new_tokens=5)
        expected = model.generate(**prompt, **options)
        twin = duplicate(model)
        assert torch.equal(twin.generate(**prompt, **options), expected)
        twin.train()(**batch).loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=5.0).step()
        assert not torch.equal(twin.eval().generate(**prompt, **options), expected)
        assert torch.equal(model.generate(**prompt, **options), expected)
