"""Merging a fixed route into the base weights: exact where it can be, measured where not, all or nothing."""

import copy
import logging
import math

import pytest
import torch
from conftest import (
    adapted,
    assert_same_tensors,
    batch_for,
    batches_for,
    build,
    first_output,
    plain_config,
    randomise,
)
from torch import nn

import tucka
from tucka.export import merge
from tucka.export.factors import low_rank_updates
from tucka.export.routes import fixed_routes
from tucka.model import layers_of

EVERY = dict(target_modules="all-linear")


def outputs(model, batch):
    with torch.no_grad():
        return first_output(model(**batch))


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def recorded(model, batch):
    with tucka.record_routes(model) as routes:
        outputs(model, batch)
    routes = routes if isinstance(routes, dict) else {"": routes}
    return {tower: taken[0].map(lambda field: field[:1]) for tower, taken in routes.items()}


@pytest.mark.parametrize(
    "name,fields",
    [
        ("bert", dict(form="multiplicative", modules_to_save=["classifier"], share_inputs=True)),
        ("gpt2", dict(form="multiplicative", **EVERY)),
        ("gpt2", dict(form="additive")),
        ("llama", dict(form="additive", share_factors=True, router_depth=1, **EVERY)),
        ("clip", dict(form="multiplicative")),
    ],
)
def test_a_recorded_route_is_merged(name, fields):
    model, batch = adapted(name, **fields).eval(), batch_for(name)
    route = recorded(model, batch)
    with tucka.pin_route(model, route):
        expected = outputs(model, batch)
    merged = model.merge_and_unload(route=route)
    assert type(merged) is type(build(name)) and not layers_of(merged)
    assert relative(outputs(merged, batch), expected) < 1e-5
    reference = build(name)
    assert {key: value.shape for key, value in merged.state_dict().items()} == {
        key: value.shape for key, value in reference.state_dict().items()
    }
    assert [type(module) for module in merged.modules()] == [type(module) for module in reference.modules()]
    again = tucka.apply(merged, plain_config(r=4, init_router="kaiming"))
    torch.testing.assert_close(outputs(again, batch), expected, rtol=1e-3, atol=1e-4)


def test_the_mean_route_of_a_loader_and_its_error(caplog):
    model, batches = adapted("bert", form="additive").eval(), batches_for("bert")
    routed = [outputs(model, batch) for batch in batches]
    plain = [outputs(build("bert"), batch) for batch in batches]
    with caplog.at_level(logging.INFO, logger="tucka.export"):
        merged, report = merge(model, "mean", batches)
    found = [outputs(merged, batch) for batch in batches]
    error = torch.cat(found) - torch.cat(routed)
    assert report.error.outputs == pytest.approx(float(error.norm() / torch.cat(routed).norm()), rel=1e-3)
    change = torch.cat(routed) - torch.cat(plain)
    assert report.error.update == pytest.approx(float(error.norm() / change.norm()), rel=1e-3)
    assert report.merged_error == pytest.approx(relative(found[0], routed[0]), rel=1e-3)
    assert report.error.samples == report.routes[""].units == 12 and len(report.layers) == 11
    assert all(line.weight_error < 1e-6 and line.update_error < 1e-5 for line in report.layers)
    assert caplog.messages == [str(report)] and "output error of the fixed route" in str(report)
    assert merged.training is False and not any(p.requires_grad for p in merged.bert.encoder.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_the_stored_weight_is_estimated(dtype):
    model = adapted("llama", dtype=dtype, form="additive").eval()
    route = recorded(model, batch_for("llama"))
    before = {layer.name: copy.deepcopy(layer.base_layer.weight).double() for layer in layers_of(model)}
    updates = low_rank_updates(model, "default", fixed_routes(model, "default", route, None))
    merged, report = merge(model, route)
    for line in report.layers:
        stored = merged.get_submodule(line.layer).weight
        delta = updates[line.layer].b.double() @ updates[line.layer].a.double()
        wanted = before[line.layer] + delta
        assert stored.dtype == dtype and torch.equal(stored, wanted.to(dtype))
        assert line.weight_error == pytest.approx(relative(stored, wanted), rel=1e-3)
        assert line.update_error == pytest.approx(float((stored.double() - wanted).norm() / delta.norm()), rel=1e-3)
        assert line.weight_error > 1e-5
    assert "largest rounding" in str(report) and report.error is None and report.merged_error is None


def test_a_route_that_is_the_same_for_all_data_needs_no_name():
    model, batch = adapted("bert", k=1, t=1, p=1, affinity="cosine").eval(), batch_for("bert")
    expected = outputs(model, batch)
    assert relative(outputs(model.merge_and_unload(), batch), expected) < 1e-5


def test_a_group_or_a_mean_by_tower():
    model, batches = adapted("clip").eval(), batches_for("clip")
    _, report = merge(model, {"text_model": 1, "vision_model": "mean"}, batches)
    assert report.routes["text_model"].group == 1 and report.routes["vision_model"].source == "mean"
    assert report.error.samples == 12 and math.isfinite(report.error.outputs)


def test_other_adapters_go_with_the_merged_one():
    model, batch = adapted("bert", target_modules=["query"]).eval(), batch_for("bert")
    model.add_adapter("other", plain_config(r=2, target_modules=["value"], init_experts="kaiming"))
    route = recorded(model, batch)
    with tucka.pin_route(model, route):
        expected = outputs(model, batch)
    merged = model.merge_and_unload(route=route, adapter_names=["default"], safe_merge=False)
    assert relative(outputs(merged, batch), expected) < 1e-5 and not layers_of(merged)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_tied_head_is_untied():
    batch = batch_for("gpt2")
    model = adapted("gpt2", target_modules=["lm_head", "c_attn"], form="additive").eval()
    embeddings = model.get_base_model().get_input_embeddings().weight.clone()
    route = recorded(model, batch)
    with tucka.pin_route(model, route):
        expected = outputs(model, batch)
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        merged = model.merge_and_unload(route=route)
    assert relative(outputs(merged, batch), expected) < 1e-5
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)
    assert merged.config.tie_word_embeddings is False


# --- refusals, and what they leave ---------------------------------------------------------------------------------


class Int8Linear(nn.Linear):
    """Stores integers under a class of its own, into which PEFT's LoRA cannot merge."""

    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features)
        self.register_buffer("scale", dense.weight.detach().abs().amax() / 127)
        self.weight = nn.Parameter((dense.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = dense.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def unmergeable():
    base = build("bert")
    last = base.bert.encoder.layer[1].attention.self
    last.value = Int8Linear(last.value)
    config = plain_config(r=4, k=3, target_modules=["query", "value"])
    return randomise(tucka.apply(base, config, calibration=[batch_for("bert")], progress=False)).eval()


def broken():
    model = adapted("bert").eval()
    with torch.no_grad():
        layers_of(model)[3].tucka_experts["default"].core[:] = math.inf
    return model


def overflowing():
    model = adapted("llama", dtype=torch.float16, form="additive").eval()
    with torch.no_grad():
        layers_of(model)[3].tucka_experts["default"].core.mul_(1e6)
    return model


LAYER = "layer 'bert.encoder.layer.1.attention.self.value'"
SIGN = r"a single expert, but the gate of affinity='paper' is the sign of a logit"


@pytest.mark.parametrize(
    "make,options,message",
    [
        (
            lambda: adapted("bert"),
            {},
            r"depends on the route of each forward \(k=3 groups of t=2 experts\)\. Say which: ",
        ),
        (lambda: adapted("bert", k=1, t=1), {}, SIGN),
        (lambda: adapted("bert"), dict(route="mean"), "give loader=batches"),
        (lambda: adapted("bert"), dict(route=7), "groups run from 0 to k-1=2, but the route names 7"),
        (lambda: adapted("bert"), dict(route=0, adapter_names=["a", "b"]), r"adapter_names=\['a', 'b'\]"),
        (unmergeable, dict(route=0), f"{LAYER} cannot be merged: result type Float can't be cast"),
        (broken, dict(route=0), "the update of layer 'bert.encoder.layer.0.intermediate.dense' is not finite"),
        (overflowing, dict(route=0), "cannot be merged: its merged weight is not finite in torch.float16"),
    ],
)
def test_what_cannot_be_merged_leaves_the_model_as_it_was(make, options, message):
    model = make().eval()
    batch = batch_for("llama" if "llama" in str(type(model.get_base_model())).lower() else "bert")
    before, state = outputs(model, batch), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload(**options)
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(outputs(model, batch), before, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=r"cannot be merged in place: .* Call merge_and_unload\(route=...\)"):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"layer 'bert\S*' cannot be merged|layer 'model\S*' cannot be merged"):
        layers_of(model)[0].merge()


def test_an_adapter_that_is_not_active_is_not_merged():
    model = adapted("bert").eval()
    model.add_adapter("other", plain_config(r=2))
    with pytest.raises(ValueError, match=r"adapter 'other' must be the only active one, but active are \['default'\]"):
        model.merge_and_unload(route=0, adapter_names=["other"])


def test_an_offloaded_layer_is_not_merged():
    model = adapted("bert", form="additive")
    layers_of(model)[5].base_layer.to("meta")
    with pytest.raises(ValueError, match=f"{layers_of(model)[5].name}' cannot be merged: its weight is offloaded"):
        model.merge_and_unload(route=0)
    assert len(layers_of(model)) == 11 and not any(layer.merged for layer in layers_of(model))


def test_unload_still_gives_the_base_back():
    model = adapted("bert").eval()
    assert_same_tensors(model.unload().state_dict(), build("bert").state_dict())
