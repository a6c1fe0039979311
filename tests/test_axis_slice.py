"""The always-active slice on the axes of a layer's input: x' = x + x E, with E of diagonal blocks."""

import copy
import itertools
import json
from unittest import mock

import pytest
import torch
from closed_counts import assert_counts_are_closed
from conftest import (
    FORMS,
    adapted,
    adapter_state,
    assert_same_state,
    batch_for,
    build,
    outputs,
    plain_config,
    randomise,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import tucka
from analysis.adapters import read_adapter
from analysis.parameters import count, layer_shapes
from analysis.report.accounting import trained_parameters
from tucka import ops, passes
from tucka.formats import FORMAT_VERSION
from tucka.model import layers_of
from tucka.ranks import adapter_parameters, expand, truncate


def slow_matrix(blocks):
    """E entry by entry: (q − k mod A)·D/A + d goes to q·D/A + d."""
    width, _, places = blocks.shape
    matrix = blocks.new_zeros(width * places, width * places)
    for k in range(width):
        for q in range(width):
            for d in range(places):
                matrix[(q - k) % width * places + d, q * places + d] = blocks[k, q, d]
    return matrix


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 4),
    places=st.integers(1, 3),
    rows=st.lists(st.integers(0, 3), max_size=3),
    span=st.sampled_from([1, 25, passes.SPAN]),
)
def test_it_multiplies_by_a_matrix_of_diagonal_blocks(width, places, rows, span):
    """In one span of rows or in several."""
    blocks = torch.randn(width, width, places, dtype=torch.float64, requires_grad=True)
    x = torch.randn(*rows, width * places, dtype=torch.float64, requires_grad=True)
    matrix = slow_matrix(blocks)
    torch.testing.assert_close(ops.axes_matrix(blocks), matrix, rtol=0, atol=0)
    by_source = ops.axes_by_source(blocks)
    for h, q in itertools.product(range(width), repeat=2):
        assert torch.equal(by_source[h, q], blocks[(q - h) % width, q] + (h == q))
    expected = x + x @ matrix
    weights = torch.randn_like(expected)
    slow = torch.autograd.grad((expected * weights).sum(), (x, blocks))
    with mock.patch.object(passes, "SPAN", span):
        for found in (x + ops.on_axes(x, blocks), passes.add_on_axes(x, blocks)):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            for one, other in zip(torch.autograd.grad((found * weights).sum(), (x, blocks)), slow):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 3, 6])
def test_its_gradient(width):
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    blocks = torch.randn(width, width, 6 // width, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(passes.add_on_axes, (x, blocks))


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 4),
    places=st.integers(1, 3),
    size=st.floats(-8, 8),
    bound=st.sampled_from([1e-3, 0.5, 2, 1e300]),
)
def test_no_size_of_its_parameters_takes_it_past_its_bound(width, places, size, bound):
    blocks = torch.randn(width, width, places, dtype=torch.float64) * 10**size
    bounded = ops.axes_matrix(ops.bound_axes(blocks, bound))
    matrix, features = slow_matrix(blocks), width * places
    assert bounded.square().sum(1).mean().sqrt() <= bound * (1 + 1e-12)
    expected = matrix / (1 + matrix.square().sum() / features / bound / bound) ** 0.5
    torch.testing.assert_close(bounded, expected, rtol=1e-12, atol=0)


def test_the_gradient_of_a_bounded_one():
    blocks = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda blocks: ops.bound_axes(blocks, 0.5), blocks)
    (grad,) = torch.autograd.grad((ops.bound_axes(0 * blocks, 0.5) * 3).sum(), blocks)
    assert not grad.any()
    zero = torch.zeros(2, 2, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad((ops.bound_axes(zero, 0.5) * 3).sum(), zero)
    assert torch.equal(grad, torch.full_like(zero, 3))


@pytest.mark.parametrize("hooked", [False, True], ids=["passes", "plain"])
@pytest.mark.parametrize("trainable", ["all", "core"])
@pytest.mark.parametrize("bound", [None, 0.3], ids=["unbounded", "bounded"])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_adds_it_to_what_its_experts_do(form, bound, trainable, hooked):
    """Against the same layer without it, whose weight has E in it."""
    fields = dict(r=3, k=3, t=2, p=2, target_modules=["0"], init_experts="kaiming", trainable=trainable, **form)
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(6, 5)).double()
    model = randomise(tucka.apply(copy.deepcopy(base), plain_config(**fields, axis_block_size=2, axis_bound=bound)))
    (layer,) = layers_of(model)
    experts = layer.tucka_experts["default"]
    x = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    if hooked:
        layer.base_layer.register_forward_hook(lambda *args: None)
    model(x)  # starts the router
    matrix = slow_matrix(experts.axis_core)
    if bound is not None:
        matrix = matrix / (1 + matrix.square().sum() / 6 / bound**2).sqrt()

    y = model(x)
    without, kept = layer.base_layer(x), experts.axis_core
    del experts.axis_core
    experts.register_parameter("axis_core", None)
    plain = model(x)
    experts.axis_core = kept
    assert kept.abs().min() > 0
    torch.testing.assert_close(y - plain, layer.base_layer(x + x @ matrix) - without, rtol=1e-10, atol=1e-12)

    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn_like(y)
    found = torch.autograd.grad((y * weights).sum(), [x, *parameters], allow_unused=True, materialize_grads=True)
    slow = plain + layer.base_layer(x + x @ matrix) - without
    expected = torch.autograd.grad((slow * weights).sum(), [x, *parameters], allow_unused=True, materialize_grads=True)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("normalize", [False, True, "bounded"])
@pytest.mark.parametrize("name", ["bert", "deberta", "vit", "gpt2", "llama", "t5", "clip"])
def test_it_starts_at_the_base_model_trains_saves_and_loads(name, normalize, tmp_path):
    base, batch = build(name), batch_for(name)
    expected = outputs(base, batch)
    fields = dict(form="additive", share_factors=True, affinity="cosine", init_router="kmeans", t=1, p=1)
    kinds = dict(
        r=4, k=2, axis_block_size=2, normalize=normalize, init_experts="kaiming" if normalize is True else "identity"
    )
    model = tucka.apply(base, plain_config(**fields, **kinds), calibration=[batch])
    if normalize is not True:
        assert torch.equal(outputs(model, batch), expected)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    moved = [layer.tucka_experts["default"].axis_core for layer in layers_of(model)]
    assert all(bool(core.any()) for core in moved)
    trained = outputs(model.eval(), batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert_same_state(adapter_state(loaded), adapter_state(model))
    assert torch.equal(outputs(loaded, batch), trained)
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch), expected)


def test_two_adapters_add_theirs():
    model, batch = adapted("bert", torch.float64, axis_block_size=2, form="additive"), batch_for("bert")
    config = plain_config(r=4, k=3, axis_block_size=4, form="additive")
    model.add_adapter("other", config)
    randomise(model)
    layer = layers_of(model)[0]
    x = torch.randn(3, 7, layer.in_features, dtype=torch.float64)
    first, second = (slow_matrix(layer.tucka_experts[name].axis_blocks) for name in ("default", "other"))
    torch.testing.assert_close(layer._on_axes(x, ["default", "other"]), x + x @ first + x @ second)
    model.base_model.set_adapter(["default", "other"])
    assert outputs(model, batch).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generated_tokens_have_it(name, form):
    model = adapted(name, torch.float64, axis_block_size=2, **form).eval()
    batch = batch_for(name)
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
    options = dict(
        max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    ready = model.generate(**prompt, **options)
    slow = model.generate(**prompt, use_cache=False, **options)
    assert torch.equal(ready.sequences, slow.sequences)
    torch.testing.assert_close(torch.stack(ready.logits), torch.stack(slow.logits), rtol=1e-8, atol=1e-8)
    for layer in layers_of(model):
        nn.init.zeros_(layer.tucka_experts["default"].axis_core)
    without = model.generate(**prompt, **options)
    assert not torch.allclose(without.logits[-1], ready.logits[-1], atol=1e-3)


def test_truncating_and_expanding_leave_it_alone():
    fields = dict(form="additive", normalize="bounded", affinity="cosine", t=1, p=1)
    model, batch = adapted("bert", torch.float64, axis_block_size=4, **fields), batch_for("bert")
    kept = {key: value.clone() for key, value in model.state_dict().items() if "axis_core" in key}
    before = outputs(model, batch)
    expand(model, k=6)
    torch.testing.assert_close(outputs(model, batch), before, rtol=1e-4, atol=1e-5)  # copies are told apart by little
    truncate(model, ranks=2)
    assert kept and all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())


@pytest.mark.parametrize("fields", [{}, {"trainable": "core"}, {"form": "multiplicative"}, {"share_factors": True}])
def test_counts_are_closed(fields, tmp_path):
    fields = dict(form="additive", k=3, r=4, target_modules=["query", "dense"], axis_block_size=4) | fields
    model = assert_counts_are_closed(plain_config(**fields))
    model.save_pretrained(tmp_path)
    assert trained_parameters(read_adapter(tmp_path)).parameters.sum() == adapter_parameters(model)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="axis_block_size=0 is not one of 'auto', 'lean' or a whole number"):
        plain_config(axis_block_size=0)
    with pytest.raises(ValueError, match="axis_block_size='wide' is not one of 'auto', 'lean' or a whole number"):
        plain_config(axis_block_size="wide")
    with pytest.raises(ValueError, match="axis_bound=0 scales what experts act as: it must be above 0"):
        plain_config(axis_bound=0)
    with pytest.raises(ValueError, match="axis_bound='none' is not a finite number"):
        plain_config(axis_bound="none")
    with pytest.raises(ValueError, match=r"core_gain=-1\.0 scales what experts act as: it must be above 0"):
        plain_config(core_gain=-1.0)


@pytest.mark.parametrize(
    "asked,features,outputs,width",
    [("auto", 256, 300, 2), ("auto", 260, 256, 4), ("auto", 258, 258, 2), ("auto", 9, 9, 1), ("lean", 256, 300, 2),
     ("lean", 260, 260, 4), ("lean", 260, 256, 2), (2, 9, 5, 1), (4, 6, 5, 2), (6, 9, 5, 3), (16, 8, 5, 8),
     (5, 5, 5, 5)],
)  # fmt: skip
def test_a_width_follows_the_layer(asked, features, outputs, width):
    """The largest divisor of what is asked and of the input features; "auto" and "lean" ask by the layer's sides."""
    fields = dict(r=2, target_modules=["0"], axis_block_size=asked)
    config = plain_config(**fields)
    model = tucka.apply(nn.Sequential(nn.Linear(features, outputs)), config)
    (layer,) = layers_of(model)
    assert layer.tucka_experts["default"].axis_core.shape == (width, width, features // width)
    trained = sum(value.numel() for name, value in model.named_parameters() if ".tucka_" in name)
    shapes = layer_shapes(nn.Sequential(nn.Linear(features, outputs)), ["0"])
    assert trained == count(shapes, "tucka", config=config).total


def test_a_file_of_another_size_is_refused(tmp_path):
    adapted("bert", axis_block_size=2).save_pretrained(tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace('"axis_block_size": 2', '"axis_block_size": 4'))
    with pytest.raises(ValueError, match=r"axis_core has shape \(2, 2, 16\) in the adapter file, \(4, 4, 8\) in"):
        PeftModel.from_pretrained(build("bert"), tmp_path)


@pytest.mark.parametrize("rank", [3, 40])
def test_a_lora_of_a_lower_rank_is_the_nearest_one(rank, tmp_path):
    model, batch = adapted("bert", axis_block_size=2, form="additive").eval(), batch_for("bert")
    (exact,) = tucka.to_lora(model, tmp_path / "exact", "mean", [batch]).loras
    report = tucka.to_lora(model, tmp_path / "cut", "mean", [batch], rank=rank)
    assert set(report.ranks.values()) == {min(rank, 32)}
    if rank < 32:
        assert exact.error.outputs < report.loras[0].error.outputs
    full, short = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("exact", "cut"))
    for key in (key for key in full if "lora_A" in key):
        other = key.replace("lora_A", "lora_B")
        whole = full[other] @ full[key]
        values = torch.linalg.svdvals(whole)
        assert (short[other] @ short[key] - whole).norm() <= values[rank:].norm() * 1.001 + 1e-4
    with pytest.raises(ValueError, match="a LoRA has a rank of at least 1, got rank=0"):
        tucka.to_lora(model, tmp_path / "cut", 0, rank=0)


def test_an_offloaded_weight_is_said_to_be(tmp_path):
    model = adapted("bert", axis_block_size=2, form="additive")
    layer = layers_of(model)[1]
    layer.base_layer.to("meta")
    with pytest.raises(ValueError, match=f"layer '{layer.name}' cannot be exported or merged: its weight is offloaded"):
        model.merge_and_unload(route=0)
    with pytest.raises(ValueError, match="cannot be exported or merged"):
        tucka.to_lora(model, tmp_path / "lora", 0)
    assert layers_of(model) and not (tmp_path / "lora").exists()


def test_files_of_before_have_none():
    assert tucka.TuckAConfig(format_version=1, axis_block_size=2).axis_block_size is None
    assert tucka.TuckAConfig.paper().axis_block_size is None
    older = tucka.TuckAConfig(format_version=1, core_gain=7.0)
    assert (older.core_gain, older.axis_bound, older.format_version) == (3.0, None, FORMAT_VERSION)
    last = tucka.TuckAConfig(format_version=2, axis_block_size=4, core_gain=7.0, axis_bound=0.5)
    assert (last.axis_block_size, last.core_gain, last.axis_bound) == (4, 3.0, None)


def test_files_of_before_have_blocks_of_two_in_layers_that_narrow(tmp_path):
    """Version 3 wrote "auto" for what is "lean" now."""
    base = nn.Sequential(nn.Linear(260, 300), nn.Linear(300, 5))
    config = plain_config(r=2, target_modules=["0", "1"], axis_block_size="lean", axis_bound=0.5)
    model = randomise(tucka.apply(copy.deepcopy(base), config))
    widths = [len(layer.tucka_experts["default"].axis_core) for layer in layers_of(model)]
    assert widths == [4, 2]
    x = torch.randn(3, 260)
    expected = model(x)
    tucka.save(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "format_version": 3, "axis_block_size": "auto"}))
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert (loaded.peft_config["default"].axis_block_size, loaded.peft_config["default"].axis_bound) == ("lean", 0.5)
    assert torch.equal(loaded(x), expected)


def test_its_rate_is_that_of_what_always_acts():
    model = adapted("bert", axis_block_size=2)
    for rates, group in ((dict(core_lr=0.2), "cores"), (dict(core_lr=0.2, shared_lr=0.1), "shared_core")):
        held = {each["name"]: each for each in tucka.param_groups(model, 1.0, **rates)}
        slices = [name for name in held[group]["parameter_names"] if name.endswith("axis_core")]
        assert len(slices) == len(layers_of(model)) and held[group]["lr"] == list(rates.values())[-1]
