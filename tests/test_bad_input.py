"""Bad input is a clear error, raised before the model or a file is touched."""

import json
import shutil

import pytest
import torch
from conftest import adapted, batch_for, build, plain_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import tucka


def snapshot(model):
    """Everything wrapping could change: modules, attributes, hooks, parameters and whether they train."""
    return {
        name: (
            type(module),
            sorted(vars(module)),
            len(module._forward_pre_hooks) + len(module._forward_hooks),
            [(key, p.requires_grad, p.clone()) for key, p in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }


def assert_untouched(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (kind, attributes, hooks, parameters) in before.items():
        assert after[name][:3] == (kind, attributes, hooks), name
        for (key, trains, value), (other, still, now) in zip(parameters, after[name][3]):
            assert (key, trains) == (other, still) and torch.equal(value, now)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"r": 64}, "rank r=64 exceeds in_features=32 of layer 'bert.encoder.layer.0.attention.self.query'"),
        ({"r": 36, "form": "additive", "target_modules": ["layer.1.output.dense"]},
         "rank r=36 exceeds out_features=32 of layer 'bert.encoder.layer.1.output.dense'"),
        ({"rank_pattern": {"layer.1.*query": 99}}, "rank r=99 exceeds in_features=32 of layer .*layer.1.*query'"),
        ({"target_modules": ["nowhere"]}, "Target modules {'nowhere'} not found in the base model"),
        ({"target_modules": ["LayerNorm", "query"]},
         "target module 'bert.embeddings.LayerNorm' is a LayerNorm; supported are torch.nn.Linear"),
        ({"target_modules": ["word_embeddings"]}, "'bert.embeddings.word_embeddings' is a Embedding; supported"),
        ({"router_module": "decoder"}, "router_module='decoder' names none of the 4 adapted layers: bert.encoder"),
        ({"router_module": "query"}, "router_module='query' matches 2 adapted layers, 'bert.encoder.layer.0"),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_changes_nothing(fields, message):
    model = build("bert")
    before = snapshot(model)
    config = plain_config(**{"r": 4, "target_modules": ["query", "value"], **fields})
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert_untouched(model, before)
    tucka.apply(model, plain_config(r=4, target_modules=["query"]))(**batch_for("bert"))


def test_a_second_adapter_that_does_not_fit_changes_nothing():
    model = adapted("bert", target_modules=["query"])
    before, names = snapshot(model), list(model.peft_config)
    with pytest.raises(ValueError, match="rank r=99 exceeds in_features=32"):
        model.add_adapter("second", plain_config(r=99, target_modules=["query", "value"]))
    assert_untouched(model, before)
    assert list(model.peft_config) == names


def test_attention_that_reads_its_projection_unseen_is_refused():
    """`nn.MultiheadAttention` never calls its output projection, so adapting it would silently do nothing."""
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match=r"target module '0.out_proj' is a NonDynamicallyQuantizableLinear; supported"):
        get_peft_model(model, plain_config(r=2, target_modules=["out_proj"]))


def test_an_unknown_architecture_needs_targets():
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), plain_config(r=2))
    assert tucka.apply(nn.Sequential(nn.Linear(4, 4)))(torch.randn(2, 4)).shape == (2, 4)


def test_applying_twice_is_refused():
    model = adapted("bert")
    with pytest.raises(ValueError, match=r"the model is wrapped already; add another adapter with model.add_adapter"):
        tucka.apply(model)


@pytest.fixture
def saved(tmp_path):
    """A good adapter on disk."""
    directory = tmp_path / "adapter"
    adapted("bert", balance_bias=True).save_pretrained(directory)
    return directory


def rewrite(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def load_untouched(directory, message):
    """Loading must fail with that message and leave a fresh base model as it was."""
    model = build("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, directory)
    assert_untouched(model, before)
    wrapped = adapted("bert")
    before, names = snapshot(wrapped), list(wrapped.peft_config)
    with pytest.raises(ValueError, match=message):
        wrapped.load_adapter(directory, "broken")
    assert_untouched(wrapped, before)
    assert list(wrapped.peft_config) == names


@pytest.mark.parametrize(
    "end,shape,message",
    [
        ("core", (3, 2, 5, 5), r"core has shape \(3, 2, 5, 5\), but k=3, t=2, p=2, r=4, .* give \(3, 2, 4, 4\)"),
        ("expert_factor", (2, 3), r"expert_factor has shape \(2, 3\), but .* give \(2, 2\)"),
        ("input_factor", (32, 3), r"input_factor has shape \(32, 3\), but .* give \('…', 4\)"),
        ("centroids", (5, 64), r"centroids has shape \(5, 64\), but .* give \(6, '…'\)"),
        ("balance_bias", (2, 2), r"balance_bias has shape \(2, 2\), but .* give \(3, 2\)"),
        ("shared_core", (4,), r"shared_core has shape \(4,\), but .* give \(4, 4\)"),
    ],
)
def test_shapes_that_disagree_with_the_configuration(saved, end, shape, message):
    def change(tensors):
        key = next(key for key in tensors if key.endswith(end))
        tensors[key] = torch.zeros(shape)

    rewrite(saved, change)
    load_untouched(saved, message)


def test_a_truncated_file(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    load_untouched(saved, "is not a whole safetensors file")


def test_a_file_of_something_else(saved):
    (saved / "adapter_model.safetensors").write_bytes(b"PK\x03\x04 not tensors at all")
    load_untouched(saved, "is not a whole safetensors file")


def test_pickles_are_never_read(saved):
    tensors = load_file(saved / "adapter_model.safetensors")
    (saved / "adapter_model.safetensors").unlink()
    torch.save(tensors, saved / "adapter_model.bin")
    load_untouched(saved, "adapter_model.bin is a pickle; adapters are read from adapter_model.safetensors only")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"routing": "token"}, "routing='token' is not one of"),
        ({"r": 0}, "r=0 is not a whole number of at least 1"),
        ({"k": "3"}, "k='3' is not a whole number"),
        ({"r": 5}, r"core has shape \(3, 2, 4, 4\), but k=3, t=2, p=2, r=5"),
        ({"format_version": 99}, "format_version=99 is of a later tucka"),
    ],
)
def test_a_configuration_file_that_is_wrong(saved, change, message):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    load_untouched(saved, message)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda tensors: tensors.pop(next(key for key in tensors if key.endswith("core"))),
         "the adapter file lacks 1 of [0-9]+ tensors, .*core among them"),
        (lambda tensors: tensors.update({"base_model.model.bert.x.tucka_experts.core": torch.zeros(3, 2, 4, 4)}),
         "the adapter file holds 1 tensors the model has no place for, as base_model.model.bert.x"),
    ],
)  # fmt: skip
def test_reloading_is_strict(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(build("bert"), saved)
    # An adapter that is already there keeps every tensor it had.
    wrapped = adapted("bert", balance_bias=True)
    before = snapshot(wrapped)
    with pytest.raises(ValueError, match=message):
        wrapped.load_adapter(saved, "default")
    assert_untouched(wrapped, before)


def test_an_adapter_of_a_wider_model_names_both_shapes(saved):
    def widen(tensors):
        for key in tensors:
            if key.endswith("input_factor"):
                tensors[key] = torch.zeros(48, 4)

    rewrite(saved, widen)
    with pytest.raises(
        ValueError, match=r"input_factor has shape \(48, 4\) in the adapter file, \(32, 4\) in the model"
    ):
        PeftModel.from_pretrained(build("bert"), saved)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_never_touch_the_model(saved, data):
    """A damaged header is refused; a damaged tensor may load, since the format has no checksum."""
    directory = saved.parent / "damaged"
    shutil.copytree(saved, directory, dirs_exist_ok=True)
    path = directory / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for position in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
        content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    try:
        tucka.TuckAConfig.from_pretrained(directory)
    except ValueError as error:
        assert str(path) in str(error)
