"""Exports and merges of quantised bases, where their packages are installed."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from conftest import plain_config, randomise, text_batch
from peft import PeftModel

import tucka
from tucka.export import merge, to_lora
from tucka.export.factors import low_rank_updates
from tucka.export.routes import fixed_routes
from tucka.packing import keep_layout

WIDTH = 64


def four_bit(dense):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(WIDTH, dense.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4", blocksize=64)
    return layer.to("cpu")


def eight_bit(dense):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(WIDTH, dense.out_features, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(dense.weight.data, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def hqq(dense):
    quantize = pytest.importorskip("hqq.core.quantize")
    settings = quantize.BaseQuantizeConfig(nbits=8, group_size=64)
    return quantize.HQQLinear(dense, settings, compute_dtype=torch.float32, device="cpu")


def torchao(dense):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(dense, quantization.Int8WeightOnlyConfig())
    return dense


def base(convert):
    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, intermediate_size=64, vocab_size=50)).eval()
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "v_proj"):
        setattr(attention, name, convert(copy.deepcopy(getattr(attention, name))))
    if convert is torchao:
        weights = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()
        model.hf_quantizer = SimpleNamespace(quantization_config=tf.TorchAoConfig(weights))
    return model


def in_use(layer):
    """The weight of a layer, whatever stores it: what the layer makes of the unit vectors."""
    with torch.no_grad():
        return layer(torch.eye(WIDTH)).mT


@pytest.mark.filterwarnings("ignore:Merge lora module")
@pytest.mark.parametrize("form", ["multiplicative", "additive"])
@pytest.mark.parametrize(
    "convert,exact,rounding", [(four_bit, 1e-5, 0.2), (eight_bit, 0.02, 0.03), (hqq, 1e-5, 0.02), (torchao, 1e-5, 0.03)]
)
def test_quantised_bases(convert, exact, rounding, form, tmp_path):
    """A LoRA is exact up to how the base rounds activations; a merge up to requantisation, which is estimated."""
    batch = text_batch()
    config = plain_config(r=4, k=2, form=form, target_modules=["q_proj", "v_proj"])
    model = randomise(tucka.apply(base(convert), config, calibration=[batch], progress=False), 0.05).eval()
    with tucka.record_routes(model) as routes, torch.no_grad():
        model(**batch)
    route = routes[0].map(lambda field: field[:1])
    with tucka.pin_route(model, route), torch.no_grad():
        expected = model(**batch).logits
    to_lora(model, tmp_path, route)
    with tucka.pin_route(model, route), torch.no_grad():
        assert torch.equal(model(**batch).logits, expected), "an export leaves the model as it is"
    lora = PeftModel.from_pretrained(base(convert), tmp_path).eval()
    keep_layout(lora)  # a LoRA's 4-bit layers round activations in evaluations, on CPUs with AVX512-BF16
    updates = low_rank_updates(model, "default", fixed_routes(model, "default", route, None))
    names = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")]
    before = {name: in_use(model.get_base_model().get_submodule(name).base_layer) for name in names}
    kind = type(model.get_base_model().model.layers[0].self_attn.q_proj.base_layer)
    merged, report = merge(model, route)
    with torch.no_grad():
        for found, bound in ((lora, exact), (merged, rounding)):
            assert float((found(**batch).logits - expected).norm() / expected.norm()) < bound
        change = expected - base(convert)(**batch).logits
    assert float(change.norm() / expected.norm()) > 0.05
    assert type(merged.model.layers[0].self_attn.q_proj) is kind
    assert [line.layer for line in report.layers] == names
    for line in report.layers:
        delta = updates[line.layer].b @ updates[line.layer].a
        wanted = before[line.layer] + delta
        error = (in_use(merged.get_submodule(line.layer)) - wanted).norm()
        assert 0 < line.weight_error < 0.15
        assert line.weight_error == pytest.approx(float(error / wanted.norm()), rel=0.02)
        assert line.update_error == pytest.approx(float(error / delta.norm()), rel=0.02)
