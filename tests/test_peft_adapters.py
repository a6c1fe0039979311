"""What users of Hugging Face PEFT expect of any method: several adapters, state dicts, copies."""

import copy
import io
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from conftest import (
    adapted,
    assert_same_tensors,
    batch_for,
    build,
    randomise,
    stored,
)
from peft import get_peft_model, set_peft_model_state_dict
from peft_surface import (
    QUERY,
    VALUE,
    adapted_layers,
    bert,
    bert_config,
    layers,
    outputs,
    trainable,
)

import tucka


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
