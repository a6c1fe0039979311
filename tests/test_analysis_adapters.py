"""Reading adapters as numbers: from models, from directories, and refusing what is none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import adapted
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import tucka
from analysis.adapters import adapter_of, natural, read_adapter
from tucka.model import layers_of

GOLDEN = Path(__file__).parent / "data"


def assert_equal_layers(found, expected):
    assert {layer.name for layer in found.layers} == {layer.name for layer in expected.layers}
    for layer in expected.layers:
        for one, other in zip(found.layer(layer.name), layer):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("share_factors", [False, True])
@pytest.mark.parametrize("name", ["bert", "deberta", "t5", "bart", "clip", "gpt2", "vit", "llama"])
def test_a_directory_tells_what_the_model_does(name, share_factors, tmp_path):
    fields = dict(normalize="bounded", form="additive", target_modules="all-linear", r=2)
    model = adapted(name, share_factors=share_factors, **fields)
    model.save_pretrained(tmp_path)
    found = read_adapter(tmp_path)
    assert_equal_layers(found, adapter_of(model))
    assert len(found.routers) == len(adapter_of(model).routers) >= 1
    assert found.config.r == 2 and found.name == tmp_path.name


@pytest.mark.parametrize("normalize", [False, True, "bounded"])
def test_factors_act_as_they_are_read(normalize):
    model = adapted("bert", normalize=normalize, t=2, p=2, init_experts="kaiming")
    layer = layers_of(model)[0]
    read = adapter_of(model).layer(layer.name)
    formed = torch.einsum("ktqr,dq,or->ktdo", read.slices, read.input_factor, read.output_factor)
    expected = layer.tucka_experts["default"].double().to_tensor()
    torch.testing.assert_close(formed, expected, rtol=1e-6, atol=1e-9)


def test_the_weights_of_a_lasso_act(tmp_path):
    model = adapted("bert", lasso=0.1, form="additive")
    for layer in layers_of(model):
        for weight in layer.tucka_experts["default"].lasso_weights:
            torch.nn.init.uniform_(weight, 0.2, 0.8)
    model.save_pretrained(tmp_path)
    found = read_adapter(tmp_path)
    assert_equal_layers(found, adapter_of(model))
    layer = layers_of(model)[0]
    read = found.layer(layer.name)
    formed = torch.einsum("ktqr,dq,or->ktdo", read.slices, read.input_factor, read.output_factor)
    torch.testing.assert_close(formed, layer.tucka_experts["default"].double().to_tensor(), rtol=1e-6, atol=1e-9)


def test_names_sort_by_their_numbers():
    names = ["layer.10.query", "layer.2.value", "layer.2.query", "head"]
    assert sorted(names, key=natural) == ["head", "layer.2.query", "layer.2.value", "layer.10.query"]


def test_without_the_owners_names_decide(tmp_path):
    """As in files written before the configuration held the owners."""
    model = adapted("vit", share_factors=True, form="additive", target_modules=["q_proj", "o_proj"])
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config.pop("factor_owners")
    path.write_text(json.dumps(config))
    assert_equal_layers(read_adapter(tmp_path), adapter_of(model))


def test_an_owner_that_names_do_not_tell_is_asked_for(tmp_path):
    model = adapted("bert", share_factors=True, form="additive", target_modules="all-linear", r=2)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["factor_owners"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"pooler\.dense' shares its factors with one of 3 layers .*adapter_of"):
        read_adapter(tmp_path)


def test_an_adapter_of_the_published_code_is_read():
    directories = [path.parent for path in GOLDEN.rglob("adapter_config.json")]
    assert directories
    for directory in directories:
        adapter = read_adapter(directory)
        assert adapter.layers and len(adapter.routers) == 1
        assert adapter.config.normalize is True
        for layer in adapter.layers:
            norm = torch.linalg.vector_norm(layer.input_factor)
            torch.testing.assert_close(norm, torch.ones((), dtype=torch.float64))


def test_an_adapter_without_a_router_is_read(tmp_path):
    adapted("bert").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    kept = {key: value for key, value in load_file(path).items() if "tucka_router" not in key}
    save_file(kept, path)
    adapter = read_adapter(tmp_path)
    assert adapter.layers and adapter.routers == ()


def test_what_is_no_adapter_of_ours_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        read_adapter(tmp_path)
    model = get_peft_model(adapted("bert").unload(), LoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="configures a LORA adapter"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a JSON object"):
        read_adapter(tmp_path)


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    adapted("bert").save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("expert_factor"))
    save_file({name: value for name, value in tensors.items() if name != key}, path)
    with pytest.raises(ValueError, match="has a core but no expert factor"):
        read_adapter(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_adapter(tmp_path / "b")
    save_file({"x": torch.zeros(1)}, tmp_path / "b" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="none with a core"):
        read_adapter(tmp_path / "b")


def test_a_name_must_tell_one_layer():
    adapter = adapter_of(adapted("bert"))
    assert adapter.layer("layer.0.attention.self.query").name.endswith("layer.0.attention.self.query")
    with pytest.raises(ValueError, match="'query' names 2 of the"):
        adapter.layer("query")


def test_a_plain_model_has_no_adapter():
    with pytest.raises(ValueError, match="no Tucker experts"):
        adapter_of(torch.nn.Linear(2, 2))


def test_the_owners_of_shared_factors_are_written_into_the_configuration(tmp_path):
    model = adapted("vit", share_factors=True, target_modules=["q_proj"])
    names = [layer.name for layer in layers_of(model)]
    assert model.peft_config["default"].factor_owners == {names[1]: names[0]}
    model.save_pretrained(tmp_path)
    assert tucka.TuckAConfig.from_pretrained(str(tmp_path)).factor_owners == {names[1]: names[0]}
    assert adapted("vit", target_modules=["q_proj"]).peft_config["default"].factor_owners is None
