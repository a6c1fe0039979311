"""One adapted layer against experts formed in float64 by a slow direct computation."""

import itertools

import pytest
import torch
from conftest import plain_config, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import tucka
from tucka import ops
from tucka.tensors import ExpertTensor

GRID = [
    dict(zip("ktpr", sizes), routing=routing, form=form, normalize=normalize)
    for sizes, routing, form, normalize in itertools.product(
        [(1, 1, 1, 1), (1, 3, 2, 2), (3, 1, 1, 4), (2, 2, 3, 3), (4, 3, 2, 5)],
        ["sample", "batch"],
        ["multiplicative", "additive"],
        [False, True],
    )
]
OPTIONS = [
    dict(shared_expert=False),
    dict(shared_expert=True, pooling="mean"),
    dict(shared_expert=True, tie_factors=False),
]


def one_layer(base=None, width=6, outputs=5, **fields):
    """A model that is one adapted layer, in float64, with a randomised adapter."""
    model = nn.Sequential(base or nn.Linear(width, outputs)).double()
    torch.manual_seed(7)
    fields = {"r": 3, "init_experts": "kaiming", "init_router": "kaiming", "target_modules": ["0"], **fields}
    return randomise(tucka.apply(model, plain_config(**fields)))


def unit(tensor):
    norm = torch.linalg.norm(tensor.flatten())
    return tensor / norm if norm > 0 else tensor


def formed_experts(tensor):
    """All experts as matrices (K, T, D, O), and the shared one, entry by entry from the design's formulas."""
    act = unit if tensor.normalize else (lambda part: part)
    core, c = tensor.core, act(tensor.expert_factor)
    u, v = act(tensor.input_mode), act(tensor.output_mode)
    groups, experts = core.shape[0], c.shape[0]
    formed = torch.stack(
        [
            torch.stack(
                [u @ sum(c[j, p] * act(core[i])[p] for p in range(core.shape[1])) @ v.T for j in range(experts)]
            )
            for i in range(groups)
        ]
    )
    shared = 0 if tensor.shared_core is None else u @ act(tensor.shared_core) @ v.T
    return formed, shared


def slow_route(router, x):
    """Group and gates of every unit, one unit at a time."""
    k, t = router.config.k, router.config.t
    units = [sample.reshape(-1, x.shape[-1]) for sample in x] if router.per_sample else [x.reshape(-1, x.shape[-1])]
    routes = []
    for tokens in units:
        feature = tokens.mean(0)
        if router.config.pooling == "mean_std":
            feature = torch.cat([feature, tokens.var(0, unbiased=False).clamp_min(1e-12).sqrt()])
        logits = (router.centroids @ feature).view(k, t)
        scores = torch.sigmoid(torch.stack([unit(row) for row in logits]))
        group = int(scores.max(1).values.argmax())
        routes.append((group, scores[group]))
    return routes if router.per_sample else routes * len(x)


def slow_forward(model, x):
    """The adapted layer with every expert formed and every sample on its own."""
    layer = tucka.model.layers_of(model)[0]
    formed, shared = formed_experts(layer.tucka_experts["default"])
    outputs = []
    for sample, (group, gates) in zip(x, slow_route(layer.tucka_router["default"], x)):
        update = layer.tucka_alpha["default"] * (sum(g * e for g, e in zip(gates, formed[group])) + shared)
        if layer.tucka_form["default"] == "multiplicative":
            outputs.append(layer.base_layer(sample + sample @ update))
        else:
            outputs.append(layer.base_layer(sample) + sample @ update)
    return torch.stack(outputs)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
@pytest.mark.parametrize("fields", GRID, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_layer_equals_formed_experts(fields, options):
    model = one_layer(**fields, **options)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    fast, slow = model(x), slow_forward(model, x)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(fast)
    found = torch.autograd.grad((fast * weights).sum(), parameters, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad((slow * weights).sum(), parameters, allow_unused=True, materialize_grads=True)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("form", ["multiplicative", "additive"])
def test_gradcheck(form, normalize):
    model = one_layer(form=form, normalize=normalize, k=2, t=2, p=2, r=2)
    layer = tucka.model.layers_of(model)[0]
    names, parameters = zip(*[(n, p) for n, p in layer.named_parameters() if p.requires_grad])
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        # Through the whole model: its hooks open the route.
        replaced = {f"base_model.model.0.{name}": value for name, value in zip(names, values)}
        return torch.func.functional_call(model, replaced, (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("t,has_gradient", [(1, False), (2, True)])
def test_router_gradient_needs_two_experts_under_the_papers_affinity(t, has_gradient):
    model = one_layer(t=t, p=1)
    model(torch.randn(3, 4, 6, dtype=torch.float64)).square().sum().backward()
    gradient = tucka.model.layers_of(model)[0].tucka_router["default"].centroids.grad
    assert bool(gradient.abs().max() > 1e-6) is has_gradient


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 5), t=st.integers(1, 4), p=st.integers(1, 4), r=st.integers(1, 6), samples=st.integers(0, 4),
    positions=st.integers(1, 4), form=st.sampled_from(["multiplicative", "additive"]),
    routing=st.sampled_from(["sample", "batch"]), shared=st.booleans(),
)  # fmt: skip
def test_any_sizes(k, t, p, r, samples, positions, form, routing, shared):
    model = one_layer(width=6, outputs=6, k=k, t=t, p=p, r=r, form=form, routing=routing, shared_expert=shared)
    x = torch.randn(samples, positions, 6, dtype=torch.float64)
    output = model(x)
    assert output.shape == (samples, positions, 6) and output.isfinite().all()
    if samples:
        torch.testing.assert_close(output, slow_forward(model, x), rtol=1e-10, atol=1e-12)


def test_one_expert_additive_is_lora():
    model = one_layer(k=1, t=1, p=1, r=3, form="additive", shared_expert=False, alpha=2.0)
    layer = tucka.model.layers_of(model)[0]
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    with tucka.record_routes(model) as routes:
        output = model(x)
    experts, gates = layer.tucka_experts["default"], routes[0].gates
    a = experts.input_mode.T  # (R, D), LoRA's A; B carries the one slice, its gate and its weight
    for sample, gate, y in zip(x, gates, output):
        b = 2.0 * gate * experts.expert_factor[0, 0] * experts.output_mode @ experts.core[0, 0].T
        torch.testing.assert_close(y, layer.base_layer(sample) + sample @ a.T @ b.T)


@pytest.mark.parametrize("form", ["multiplicative", "additive"])
def test_conv1d_equals_the_linear_layer_of_its_transpose(form):
    convolution = Conv1D(5, 6).double()
    linear = nn.Linear(6, 5).double()
    linear.weight.data, linear.bias.data = convolution.weight.data.T, convolution.bias.data + 0.5
    convolution.bias.data = linear.bias.data.clone()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(one_layer(convolution, form=form)(x), one_layer(linear, form=form)(x))


@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6), (3, 2, 2, 6)], ids=["2-D", "3-D", "channels last"])
def test_every_layout_of_the_input(shape):
    x = torch.randn(*shape, dtype=torch.float64)
    model = one_layer()
    torch.testing.assert_close(model(x), slow_forward(model, x.reshape(3, -1, 6)).view(*shape[:-1], 5))


def test_identity_start_is_exact_and_learns():
    torch.manual_seed(3)
    base = nn.Linear(6, 5)
    x = torch.randn(3, 4, 6)
    for fields in (dict(), dict(form="additive"), dict(tie_factors=False)):
        model = tucka.apply(nn.Sequential(base), plain_config(r=3, target_modules=["0"], **fields))
        output = model(x)
        assert torch.equal(output, base(x))
        output.square().sum().backward()
        layer = tucka.model.layers_of(model)[0]
        assert layer.tucka_experts["default"].core.grad.abs().max() > 0


@pytest.mark.parametrize("normalize", [False, True])
def test_zero_cores_zero_features_and_low_precision_give_no_nan(normalize):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model = nn.Sequential(nn.Linear(6, 5)).to(dtype)
        config = plain_config(r=3, target_modules=["0"], normalize=normalize, init_experts="kaiming")
        model = tucka.apply(model, config)
        experts = tucka.model.layers_of(model)[0].tucka_experts["default"]
        with torch.no_grad():
            experts.core.zero_()
        for x in (torch.zeros(2, 4, 6, dtype=dtype), torch.randn(2, 4, 6).to(dtype)):
            model.zero_grad()
            output = model(x)
            output.float().square().sum().backward()
            assert output.dtype == dtype and output.isfinite().all()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_mixing_touches_nothing_of_expert_size():
    """The update never forms an expert: with D = 4096 and 4096 experts it fits in a few megabytes."""
    options = dict(shared_expert=True, normalize="bounded")
    experts = ExpertTensor.new((512, 8, 4096, 4096), (8, 4), **options).identity_()
    mix = experts.mix(torch.tensor([3]), torch.rand(1, 8))
    assert mix.shape == (1, 4, 4)
    zeros, x = torch.zeros(2, 4096), torch.randn(2, 4096)
    assert ops.add_update(zeros, x @ experts.input_mode, mix, experts.output_mode).shape == (2, 4096)
