"""Factors of which the leading columns train: the others act, are saved and stay."""

import pytest
import torch
from closed_counts import assert_counts_are_closed
from conftest import (
    FORMS,
    adapted,
    adapter_state,
    assert_same_state,
    batch_for,
    batches_for,
    build,
    materialised,
    outputs,
    plain_config,
    randomise,
)
from peft import PeftModel
from torch import nn

import tucka
from analysis.adapters import read_adapter
from tucka import passes
from tucka.model import layers_of
from tucka.ranks import expand, truncate
from tucka.tensors import FACTOR_ENTRY, ExpertTensor

HELD = dict(r=6, trained_columns=2, normalize="bounded")


def held_by(model):
    return {key: value.clone() for key, value in model.state_dict().items() if ".held_" in key}


@pytest.mark.parametrize("form", FORMS)
def test_all_columns_act_and_the_leading_ones_are_parameters(form):
    tied = form.get("tie_factors", False)
    options = dict(tie_factors=tied, normalize="bounded", shared_expert=True, dtype=torch.float64)
    shape, rank = (3, 2, 8, 8 if tied else 7), (2, 6)
    experts = ExpertTensor.new(shape, rank, trained_columns=2, **options).normal_()
    names = {"core", "shared_core", "expert_factor", "input_factor"} | (set() if tied else {"output_factor"})
    assert set(dict(experts.named_parameters())) == names
    assert set(dict(experts.named_buffers())) == {"held_input"} | (set() if tied else {"held_output"})
    assert experts.input_factor.shape == (8, 2) and experts.held_input.shape == (8, 4) and experts.trained_columns == 2
    whole = ExpertTensor.new(shape, rank, **options)
    with torch.no_grad():
        whole.input_factor.copy_(experts.input_mode)
        if not tied:
            whole.output_factor.copy_(experts.output_mode)
        for name in ("core", "shared_core", "expert_factor"):
            getattr(whole, name).copy_(getattr(experts, name))
    torch.testing.assert_close(experts.to_tensor(), whole.to_tensor(), rtol=1e-12, atol=1e-14)
    group, gates = torch.tensor([2, 0]), torch.rand(2, 2, dtype=torch.float64)
    torch.testing.assert_close(experts.mix(group, gates), whole.mix(group, gates), rtol=1e-12, atol=1e-14)


def test_a_start_makes_all_columns_orthonormal():
    experts = ExpertTensor.new((2, 1, 9, 8), (1, 6), trained_columns=2, normalize="bounded").identity_()
    for factor in experts.factors[2:]:
        torch.testing.assert_close(factor.mT @ factor, torch.eye(6))
    entries = torch.cat([experts.input_factor, experts.held_input], 1)
    assert entries.square().mean().sqrt().item() == pytest.approx(FACTOR_ENTRY, rel=1e-5)


@pytest.mark.parametrize("share_factors", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "llama", "t5"])
def test_a_model_trains_saves_and_loads_and_held_columns_stay(name, form, share_factors, tmp_path):
    model = adapted(name, **HELD, **form, share_factors=share_factors).train()
    before = held_by(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    batch = batch_for(name)
    factors = {key: p.detach().clone() for key, p in model.named_parameters() if "input_factor" in key}
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert_same_state(held_by(model), before)
    moved = dict(model.named_parameters())
    assert factors and all(not torch.equal(moved[key], value) for key, value in factors.items())
    expected = outputs(model.eval(), batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert_same_state(adapter_state(loaded), adapter_state(model))
    torch.testing.assert_close(outputs(loaded, batch), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradients_are_those_of_the_leading_columns_of_whole_factors(name, form):
    """Against plain autograd through the same factors, all of which train."""
    gradients = {}
    held = adapted(name, torch.float64, **HELD, **form)
    whole = adapted(name, torch.float64, **{**HELD, "trained_columns": None}, **form)
    with torch.no_grad():
        for ours, theirs in zip(layers_of(held), layers_of(whole)):
            a, b = ours.tucka_experts["default"], theirs.tucka_experts["default"]
            b.load_state_dict({key: value for key, value in a.state_dict().items() if "_input" not in key
                               and "_output" not in key and "put_factor" not in key}, strict=False)  # fmt: skip
            b.input_factor.copy_(a.input_mode)
            if b.output_factor is not None:
                b.output_factor.copy_(a.output_mode)
        for ours, theirs in zip(layers_of(held), layers_of(whole)):
            for adapter, router in ours.tucka_router.items():
                theirs.tucka_router[adapter].load_state_dict(router.state_dict())
    for model in (held, whole):
        model.train()
        model(**batch_for(name)).loss.backward()
        gradients[model] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert gradients[held].keys() == gradients[whole].keys()
    for key, value in gradients[held].items():
        expected = gradients[whole][key]
        expected = expected[:, :2] if "put_factor" in key else expected
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("columns", [1, 3, None])
def test_the_passes_give_the_gradient_of_the_columns_asked_for(columns):
    def run(x, u, mix, v):
        x, projected = passes.project(x * 1, u, True, columns)
        return passes.add_update(x @ torch.ones(5, 4, dtype=x.dtype), projected, mix, v, True, True, columns)

    sizes = ((2, 3, 5), (5, 3), (2, 3, 3), (4, 3))
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    weights = torch.randn(2, 3, 4, dtype=torch.float64)
    found = torch.autograd.grad((run(*inputs) * weights).sum(), inputs)
    x, u, mix, v = inputs
    plain = x @ torch.ones(5, 4, dtype=x.dtype) + ((x @ u) @ mix) @ v.mT
    expected = list(torch.autograd.grad((plain * weights).sum(), inputs))
    for index in (1, 3):
        expected[index] = nn.functional.pad(expected[index][:, :columns], (0, 3 - (columns or 3)))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fields", [{}, {"share_factors": True}, {"form": "multiplicative"}, {"trainable": "core"}])
def test_counts_are_closed(fields):
    fields = dict(form="additive", k=3, target_modules=["query", "dense"], **HELD) | fields
    assert_counts_are_closed(plain_config(**fields))


def test_the_analysis_reads_whole_factors_from_a_file(tmp_path):
    model = adapted("bert", form="additive", share_factors=True, **HELD)
    model.save_pretrained(tmp_path)
    layers = {layer.name: layer for layer in read_adapter(tmp_path).layers}
    for layer in layers_of(model):
        _, (_, _, u, v) = layer.tucka_experts["default"].decomposition
        torch.testing.assert_close(layers[layer.name].input_factor, u.detach().double())
        torch.testing.assert_close(layers[layer.name].output_factor, v.detach().double())


def test_numbers_of_columns_are_checked():
    with pytest.raises(ValueError, match="trained_columns=0 is not a whole number of at least 1"):
        tucka.TuckAConfig(trained_columns=0)
    assert tucka.TuckAConfig.paper().trained_columns is None
    experts = ExpertTensor.new((1, 1, 8, 8), (1, 4), trained_columns=9)
    assert experts.held_input is None and experts.trained_columns == 4


@pytest.mark.parametrize("normalize", [False, "bounded"])
@pytest.mark.parametrize("block_size", [None, 2])
def test_truncated_factors_train_their_leading_columns(normalize, block_size, tmp_path):
    fields = dict(r=6, trained_columns=2, normalize=normalize, form="additive", block_size=block_size)
    model = adapted("bert", torch.float64, **fields)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = batch_for("bert", dtype=torch.float64)
    model(**batch).loss.backward()
    optimizer.step()
    before = materialised(model)
    report = truncate(model, ranks=5, optimizer=optimizer)
    assert report.parameters == sum(v.numel() for key, v in model.named_parameters() if ".tucka_" in key)
    after = materialised(model)
    for line in report.layers:
        experts = model.get_submodule(f"base_model.model.{line.layer}").tucka_experts["default"]
        assert experts.input_factor.shape[1] == 2 and experts.held_input.shape[1] == 3
        lost = (after[line.layer] - before[line.layer]).norm() / before[line.layer].norm()
        assert line.error == pytest.approx(float(lost), abs=1e-7)
    model.train()(**batch).loss.backward()
    optimizer.step()
    truncate(model, ranks=2, optimizer=optimizer)
    assert all(layer.tucka_experts["default"].held_input is None for layer in layers_of(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert", torch.float64), tmp_path).eval()
    torch.testing.assert_close(outputs(loaded, batch), outputs(model.eval(), batch))


def test_expanding_keeps_outputs_and_held_columns():
    torch.manual_seed(0)
    fields = dict(k=3, t=2, affinity="cosine", form="additive", init_router="kmeans", **HELD)
    batches = batches_for("bert", samples=24, size=8, dtype=torch.float64)
    model = tucka.apply(build("bert", torch.float64), plain_config(**fields), calibration=batches)
    randomise(model, 0.1).eval()
    expected, held = outputs(model, batches[0]), held_by(model)
    expand(model, batches, k=5, t=3)
    assert float((outputs(model, batches[0]) - expected).abs().max()) < 1e-6
    for key, value in held_by(model).items():  # a bounded factor may be stored at any scale
        torch.testing.assert_close(value / value.norm(), held[key] / held[key].norm())


def test_starts_from_data_reach_all_columns():
    config = plain_config(form="additive", init_experts="hosvd", init_router="kmeans", **HELD)
    torch.manual_seed(0)
    model = tucka.apply(build("bert", torch.float64), config, calibration=batches_for("bert"))
    torch.manual_seed(0)
    config = plain_config(form="additive", init_experts="hosvd", init_router="kmeans", **{**HELD, "trained_columns": 6})
    whole = tucka.apply(build("bert", torch.float64), config, calibration=batches_for("bert"))
    for one, other in zip(layers_of(model), layers_of(whole)):
        ours, theirs = one.tucka_experts["default"], other.tucka_experts["default"]
        torch.testing.assert_close(ours.input_mode, theirs.input_factor.detach())


def test_columns_that_cannot_train_are_warned_of():
    with pytest.warns(UserWarning, match="trained_columns=2 has no effect with trainable='core', which holds all"):
        plain_config(trained_columns=2, trainable="core")
