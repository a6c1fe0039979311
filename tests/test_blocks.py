"""Cores of diagonal blocks against the full cores that they stand for."""

import pytest
import torch
from conftest import (
    FORMS,
    adapted,
    adapter_state,
    assert_same_state,
    batch_for,
    batches_for,
    build,
    outputs,
    plain_config,
    randomise,
)
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

import tucka
from analysis.parameters import count, layer_shapes
from tucka import ops
from tucka.apply import default_config
from tucka.model import layers_of
from tucka.ranks import adapter_parameters, expand, suggest_ranks, truncate
from tucka.tensors import ExpertTensor


@given(width=st.integers(1, 4), count=st.integers(1, 4), leading=st.lists(st.integers(1, 3), max_size=3))
def test_blocks_and_the_core_they_stand_for(width, count, leading):
    blocks = torch.randn(*leading, count * width, width)
    core = ops.block_diagonal(blocks)
    flat = blocks.reshape(-1, count, width, width)
    expected = torch.stack([torch.block_diag(*one) for one in flat]).reshape(core.shape)
    assert torch.equal(core, expected)
    assert torch.equal(ops.diagonal_blocks(core, width), blocks)
    beside = torch.randn_like(core)
    assert torch.equal(ops.diagonal_blocks(torch.where(core == 0, beside, core), width), blocks)


def twins(normalize, lasso=0.0):
    """Experts with blocks, and full ones of the same cores."""
    options = dict(shared_expert=True, normalize=normalize, lasso=lasso, dtype=torch.float64)
    blocks = ExpertTensor.new((3, 2, 9, 8), (2, 6), block_width=2, **options).normal_()
    full = ExpertTensor.new((3, 2, 9, 8), (2, 6), **options)
    with torch.no_grad():
        for name, value in blocks.named_parameters():
            if "lasso" in name:
                value.copy_(torch.rand_like(value) + 0.5)
            getattr(full, name).copy_(ops.block_diagonal(value) if "core" in name else value)
    return blocks, full


@pytest.mark.parametrize("lasso", [0.0, 0.1])
@pytest.mark.parametrize("normalize", [False, True, "bounded"])
def test_blocks_act_as_full_cores_and_get_their_gradients(normalize, lasso):
    blocks, full = twins(normalize, lasso)
    assert blocks.core.shape == (3, 2, 6, 2) and blocks.shared_core.shape == (6, 2)
    assert blocks.shape == full.shape == (3, 2, 9, 8) and blocks.rank == full.rank == (3, 2, 6, 6)
    torch.testing.assert_close(blocks.to_tensor(), full.to_tensor(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(blocks.shared_slice, full.shared_slice, rtol=1e-12, atol=1e-14)
    group, gates = torch.tensor([2, 0, 2]), torch.rand(3, 2, dtype=torch.float64)
    weights = torch.randn(3, 6, 6, dtype=torch.float64)
    for experts in (blocks, full):
        (experts.mix(group, gates) * weights).sum().backward()
    torch.testing.assert_close(blocks.mix(group, gates), full.mix(group, gates), rtol=1e-12, atol=1e-14)
    for name, value in blocks.named_parameters():
        expected = getattr(full, name).grad
        expected = ops.diagonal_blocks(expected, 2) if "core" in name else expected
        torch.testing.assert_close(value.grad, expected, rtol=1e-9, atol=1e-12, msg=name)


def test_the_mix_of_blocks_is_differentiable():
    blocks, _ = twins("bounded")
    group, gates = torch.tensor([1, 0]), torch.rand(2, 2, dtype=torch.float64)

    def mix(core, shared_core):
        return torch.func.functional_call(blocks, {"core": core, "shared_core": shared_core}, (group, gates))

    ExpertTensor.forward, before = ExpertTensor.mix, ExpertTensor.forward
    try:
        assert torch.autograd.gradcheck(mix, (blocks.core, blocks.shared_core))
    finally:
        ExpertTensor.forward = before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "llama", "t5"])
def test_a_model_trains_saves_and_loads_blocks(name, form, tmp_path):
    model = adapted(name, r=8, block_size=2, normalize="bounded", **form)
    assert all(layer.tucka_experts["default"].core.shape[-2:] == (8, 2) for layer in layers_of(model))
    batch = batch_for(name)
    model(**batch).loss.backward()
    assert all(bool(layer.tucka_experts["default"].core.grad.any()) for layer in layers_of(model))
    expected = outputs(model.eval(), batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert loaded.peft_config["default"].block_size == 2
    assert_same_state(adapter_state(loaded), adapter_state(model))
    torch.testing.assert_close(outputs(loaded, batch), expected)


@pytest.mark.parametrize("fields", [{}, {"trainable": "core"}, {"lasso": 0.1}, {"shared_expert": False}])
def test_counts_are_closed(fields):
    fields = dict(r=8, k=3, t=2, p=2, block_size=4, form="additive", target_modules=["query", "dense"], **fields)
    config = plain_config(**fields)
    expected = count(layer_shapes(build("bert"), config.target_modules), "tucka", config=config).total
    model = tucka.apply(build("bert"), config)
    trained = sum(value.numel() for name, value in model.named_parameters() if ".tucka_" in name)
    assert trained == adapter_parameters(model) == expected


def test_ranks_are_whole_blocks():
    with pytest.raises(ValueError, match=r"rank r=10 is not a multiple of block_size=4: take one that is, or block_si"):
        tucka.TuckAConfig(r=10, block_size=4)
    with pytest.raises(ValueError, match=r"rank rank_pattern\['query'\]=6 is not a multiple of block_size=4"):
        tucka.TuckAConfig(r=8, block_size=4, rank_pattern={"query": 6})
    with pytest.raises(ValueError, match="block_size=0 is not a whole number of at least 1"):
        tucka.TuckAConfig(block_size=0)
    assert tucka.TuckAConfig(r=3, block_size=4).block_width(3) == 3, "a rank below the width has a full core"
    assert tucka.TuckAConfig.paper().block_size is None
    with pytest.raises(ValueError, match="the core's rank r=6 is not a multiple of its blocks' width 4"):
        ExpertTensor.new((1, 1, 8, 8), (1, 6), block_width=4)


@pytest.mark.parametrize("normalize", [False, "bounded"])
def test_warm_starts_take_the_blocks_of_the_decomposition(normalize):
    fields = dict(r=8, normalize=normalize, form="additive", init_experts="hosvd", init_router="kmeans")
    cores = {}
    for width in (None, 4):
        torch.manual_seed(0)
        config = plain_config(**fields, block_size=width, warm_start=1.0)
        model = tucka.apply(build("bert", torch.float64), config, calibration=batches_for("bert"))
        (layer, *_) = layers_of(model)
        cores[width] = layer.tucka_experts["default"].decomposition[0].detach()
    blocks, full = (ops.diagonal_blocks(core, 4) for core in (cores[4], cores[None]))
    cosine = torch.cosine_similarity(blocks.flatten(), full.flatten(), dim=0)
    assert float(cosine) > 0.999 and bool(blocks.any())
    assert torch.equal(cores[4], ops.block_diagonal(blocks))


@pytest.mark.parametrize("normalize", [False, True, "bounded"])
def test_truncated_blocks_become_full_cores_and_keep_what_they_can(normalize, tmp_path):
    model = adapted("bert", torch.float64, r=8, block_size=2, normalize=normalize, form="additive").eval()
    batch = batch_for("bert")
    before = adapter_state(model)
    expected = outputs(model, batch)
    truncate(model, ranks=8)
    assert_same_state(adapter_state(model), before)
    assert model.peft_config["default"].block_size == 2, "nothing was to do"
    report = truncate(model, ranks={"query": 7})
    config = model.peft_config["default"]
    assert config.block_size is None
    assert report.parameters == adapter_parameters(model) == sum(
        value.numel() for key, value in model.named_parameters() if ".tucka_" in key
    )  # fmt: skip
    kept = [line for line in report.layers if line.rank == 8]
    assert kept and max(line.error for line in kept) < 1e-7
    assert float((outputs(model, batch) - expected).norm() / expected.norm()) < 0.2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert", torch.float64), tmp_path).eval()
    torch.testing.assert_close(outputs(loaded, batch), outputs(model, batch))


def test_an_optimizer_goes_on_after_blocks_were_opened():
    model = adapted("bert", r=8, block_size=4, normalize="bounded", form="additive")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = batch_for("bert")

    def step():
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    step()
    truncate(model, ranks=6, optimizer=optimizer)
    for layer in layers_of(model):
        core = layer.tucka_experts["default"].core
        assert core.shape[-2:] == (6, 6) and optimizer.state[core]["exp_avg"].shape == core.shape
        assert bool(optimizer.state[core]["exp_avg"].any())
    assert all(torch.tensor(step()).isfinite() for _ in range(3))


@pytest.mark.parametrize("k, t", [(5, None), (None, 4)])
def test_expanding_keeps_blocks_and_outputs(k, t):
    torch.manual_seed(0)
    fields = dict(r=8, k=3, t=2, block_size=4, affinity="cosine", form="additive", init_router="kmeans")
    batches = batches_for("bert", samples=24, size=8, dtype=torch.float64)
    model = tucka.apply(build("bert", torch.float64), plain_config(**fields), calibration=batches)
    randomise(model, 0.1).eval()
    expected = outputs(model, batches[0])
    expand(model, batches, k=k, t=t)
    assert {layer.tucka_experts["default"].core.shape[-2:] for layer in layers_of(model)} == {(8, 4)}
    assert float((outputs(model, batches[0]) - expected).abs().max()) < 1e-6
    assert model.peft_config["default"].block_size == 4


def test_suggested_ranks_are_whole_blocks_within_the_budget():
    batches = batches_for("bert")
    config = plain_config(r=8, block_size=4, form="additive", init_experts="gradient", init_router="kmeans")
    suggested = suggest_ranks(build("bert"), batches, budget=6000, config=config)
    ranks = set(suggested.rank_pattern.values())
    assert all(rank <= 4 or rank % 4 == 0 for rank in ranks) and max(ranks) > 4
    model = tucka.apply(build("bert"), suggested, calibration=batches)
    assert 5000 < adapter_parameters(model) <= 6000


def test_the_default_rank_of_narrow_layers_is_whole_blocks():
    config = default_config(build("clip"))  # widths 24 and 32
    assert config.r % config.block_width(config.r) == 0 and config.r <= 24


def test_the_gain_of_bounded_cores_is_a_scale_of_their_parameters():
    """γ𝒢 alone enters: twice the gain acts on half the parameters as the gain did on all of them."""
    batch, fields = batch_for("bert"), dict(normalize="bounded", shared_expert=True)
    one, other = (adapted("bert", torch.float64, core_gain=gain, **fields).eval() for gain in (3.0, 6.0))
    randomise(one)
    other.load_state_dict(one.state_dict())
    assert not torch.allclose(outputs(other, batch), outputs(one, batch))
    with torch.no_grad():
        for layer in layers_of(other):
            experts = layer.tucka_experts["default"]
            experts.core /= 2
            experts.shared_core /= 2
    torch.testing.assert_close(outputs(other, batch), outputs(one, batch), rtol=1e-10, atol=1e-12)
