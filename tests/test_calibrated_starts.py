"""What a calibrated start holds, against moments gathered by plain hooks on the base model and a slow HOSVD."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import adapter_state, batches_for, build, first_output, router_of, started
from test_hosvd import assert_same_space, formed, slow

import tucka
from tucka.model import dispatchers_of, layers_of

ARCHITECTURES = ["bert", "vit", "gpt2", "llama", "t5", "clip", "deberta"]
float64 = torch.float64


def outputs(model, batches):
    with torch.no_grad():
        return [first_output(model(**batch)) for batch in batches]


def experts_of(model):
    return {layer.name: layer.tucka_experts["default"] for layer in layers_of(model)}


# --- the base model, bit for bit -------------------------------------------------------------------------------------


SHARED = dict(share_factors=True, init_router="kmeans_balanced", affinity="cosine")
STARTS = {
    "gradient": dict(init_experts="gradient"),
    "gradient, additive, shared": dict(init_experts="gradient", form="additive", normalize="bounded", **SHARED),
    "hosvd, shared": dict(init_experts="hosvd", **SHARED),
    "hosvd, additive": dict(init_experts="hosvd", form="additive", normalize="bounded"),
}
"""Forms, normalisations and both k-means starts, with and without shared factors."""

CASES = [(name, "gradient") for name in ARCHITECTURES]
CASES += [("bert", start) for start in list(STARTS)[1:]] + [("gpt2", "hosvd, additive")]
CASES += [("vit", "hosvd, shared"), ("t5", "hosvd, shared"), ("t5", "gradient, additive, shared")]
CASES += [("clip", "gradient, additive, shared"), ("deberta", "hosvd, shared")]
every_start = pytest.mark.parametrize(("name", "start"), CASES)


@every_start
def test_the_wrapped_model_equals_the_base_model(name, start):
    batches = batches_for(name)
    model, base = started(name, **STARTS[start]), build(name)
    assert all(torch.equal(*pair) for pair in zip(outputs(model, batches), outputs(base, batches)))
    torch.manual_seed(0)
    fresh = experts_of(tucka.apply(build(name), model.peft_config["default"]))
    for layer_name, experts in experts_of(model).items():
        assert not experts.core.any() and not experts.shared_core.any()
        assert not torch.equal(experts.input_mode, fresh[layer_name].input_mode), layer_name


# --- moments, directly -----------------------------------------------------------------------------------------------


def heard_by_plain_hooks(name, layer_names, batches, form, gradients):
    """{layer: [(x (B, S, D), z (B, S, ·)) of every batch]}, from hooks on a base model that was never wrapped."""
    model = build(name).to(float64)
    told = {layer_name: [] for layer_name in layer_names}
    pending = []

    def keep(layer_name, x, z):
        if x.shape[0] != samples:  # relative positions, which all samples share
            return z
        if gradients:
            z = z.clone()
            z.retain_grad()
        pending.append((layer_name, x, z))
        return z

    def before(layer_name, module, args):
        return (keep(layer_name, args[0], args[0]),)

    def after(layer_name, module, args, output):
        return keep(layer_name, args[0], output)

    for layer_name in layer_names:
        module = model.get_submodule(layer_name)
        if form == "additive":
            module.register_forward_hook(partial(after, layer_name))
        else:
            module.register_forward_pre_hook(partial(before, layer_name))
    for batch in batches:
        samples = len(next(iter(batch.values())))
        loss = model(**batch).loss if gradients else model(**batch)
        if gradients:
            loss.backward()
        for layer_name, x, z in pending:
            side = z.grad if gradients else z
            told[layer_name].append(
                (x.detach().reshape(samples, -1, x.shape[-1]), side.detach().reshape(samples, -1, z.shape[-1]))
            )
        pending.clear()
    return told


def expectation(told, batches, clusters, cells, gradients):
    """E[x zᵀ | cluster], sample by sample: each weighs alike, its activations by token mean, its gradients by sum."""
    d, o = told[0][0].shape[-1], told[0][1].shape[-1]
    tensor, first = np.zeros((cells, d, o)), 0
    for (x, z), batch in zip(told, batches):
        mask = batch.get("attention_mask")
        for sample in range(len(x)):
            keep = slice(None)
            # Every mask here is of the text; a layer that sees another length sees no padding.
            if mask is not None and mask.shape[1] == x.shape[1]:
                keep = mask[sample].bool()
            rows, others = x[sample][keep].numpy(), z[sample][keep].numpy()
            outer = rows.T @ others
            tensor[clusters[first + sample]] += outer * len(x) if gradients else outer / len(rows)
        first += len(x)
    counts = np.bincount(clusters, minlength=cells).clip(1)
    return tensor / counts[:, None, None]


def clusters_of(model, batches):
    """{tower: group · T + expert of the largest gate}, of every sample, from recorded routes."""
    with torch.no_grad(), tucka.record_routes(model) as routes:
        for batch in batches:
            model(**batch)
    routes = routes if isinstance(routes, dict) else {next(iter(dispatchers_of(model))): routes}
    return {
        tower: torch.cat([r.group * r.gates.shape[1] + r.gates.argmax(-1) for r in taken]).numpy()
        for tower, taken in routes.items()
    }


def assert_starts_from(model, name, batches):
    """Warm experts equal the HOSVD of the directly formed tensors, scaled; shared factors that of all their layers."""
    config, layers = model.peft_config["default"], layers_of(model)
    gradients = config.init_experts == "gradient"
    clusters = clusters_of(model, batches)
    told = heard_by_plain_hooks(name, [layer.name for layer in layers], batches, config.form, gradients)
    families = {}
    for layer in layers:
        if told[layer.name]:
            families.setdefault(id(layer.tucka_experts["default"].input_mode), []).append(layer)
    k, t, p, r = config.k, config.t, config.p, config.r
    for family in families.values():
        tensors = [
            torch.from_numpy(expectation(told[layer.name], batches, clusters[layer.dispatcher.name], k * t, gradients))
            for layer in family
        ]
        expected = slow([y.unflatten(0, (k, t)) for y in tensors], [(p, r)] * len(family), config.form != "additive")
        for layer, parts in zip(family, expected):
            experts = layer.tucka_experts["default"]
            for basis, other in zip(experts.factors[2:], parts[2:]):
                assert_same_space(basis.detach(), other, tolerance=1e-5)  # the Gram matrix squares the spectrum
            whole = formed(parts)
            size = np.linalg.norm(whole, axis=(-2, -1)).mean()
            scale = (-1 if gradients else 1) * config.warm_start / (config.alpha * size)
            np.testing.assert_allclose(experts.to_tensor().detach(), scale * whole, rtol=0, atol=1e-7)


@every_start
def test_experts_equal_a_direct_computation(name, start):
    """Warm, so that cores can be compared; routes are the base model's: they are taken before any update."""
    batches = batches_for(name, dtype=float64)
    model = started(name, batches, float64, **STARTS[start], shared_expert=False, warm_start=0.5)
    assert_starts_from(model, name, batches)


def test_a_warm_start_differs_from_a_cold_one_in_its_cores_alone():
    batches = batches_for("bert")
    cold, warm = (started(batches=batches, init_experts="hosvd", warm_start=w) for w in (0.0, 0.5))
    held, other = adapter_state(cold), adapter_state(warm)
    assert {key.rpartition(".")[2] for key in held if not torch.equal(held[key], other[key])} == {"core", "shared_core"}


def test_clusters_are_those_of_the_started_router():
    """Two clear kinds of text: k-means parts them, and so do the routes that the moments go by."""
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.randint(start, start + 5, (8, 6), generator=generator) for start in (3, 40))
    batches = [{"input_ids": rows} for rows in torch.stack([low, high], 1).flatten(0, 1).split(4)]
    model = started(batches=batches, t=1, p=1, affinity="cosine", init_experts="hosvd")
    clusters = clusters_of(model, batches)[""].reshape(8, 2)
    assert len({*clusters[:, 0]}) == len({*clusters[:, 1]}) == 1 and clusters[0, 0] != clusters[0, 1]


def test_large_layers_are_sketched_and_agree(monkeypatch):
    """The same start with every tensor sketched; a rank at which 2R + 16 is below the width."""
    batches = batches_for("bert", dtype=float64)
    fields = dict(init_experts="gradient", warm_start=0.5, shared_expert=False, r=2)
    formed_model = started("bert", batches, float64, **fields)
    monkeypatch.setattr(tucka.initialization, "FORMED_LIMIT", 0)
    sketched = started("bert", batches, float64, **fields)
    for one, other in zip(experts_of(formed_model).values(), experts_of(sketched).values()):
        overlap = torch.linalg.svdvals(one.input_mode.detach().T @ other.input_mode.detach())
        assert overlap.min() > 0.9
        assert not torch.equal(one.input_mode, other.input_mode)


# --- warm starts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, "bounded"])
@pytest.mark.parametrize("shared", [False, True])
def test_experts_of_a_warm_start_have_the_size_asked_for(shared, normalize):
    """The mean over experts of ‖α 𝒯[i,j]‖; with a shared slice, of that slice and the expert together."""
    fields = dict(form="additive" if shared else "multiplicative", normalize=normalize, shared_expert=shared)
    model = started(dtype=float64, **fields, warm_start=0.3, alpha=3.0)
    for held in experts_of(model).values():
        slices = held.to_tensor() + (shared_slice(held) if shared else 0)
        size = 3.0 * slices.square().sum((-2, -1)).sqrt().mean()
        torch.testing.assert_close(size, torch.tensor(0.3, dtype=float64))


def shared_slice(experts):
    """The shared slice as it acts, in the layer's own features."""
    return experts.input_mode @ experts.mix(None, None)[0] @ experts.output_mode.T


@pytest.mark.parametrize(("t", "p", "normalize"), [(2, 2, False), (2, 2, "bounded"), (2, 5, False), (3, 1, "bounded")])
def test_shared_slice_and_cores_add_up_to_the_decomposition(t, p, normalize):
    """The shared slice holds the mean expert. Exact where C spans the constant vector; else as near as C allows."""
    fields = dict(init_experts="gradient", warm_start=0.5, t=t, p=p, normalize=normalize)
    alone = started(dtype=float64, **fields, shared_expert=False)
    split = started(dtype=float64, **fields, shared_expert=True)
    for one, other in zip(experts_of(alone).values(), experts_of(split).values()):
        whole = one.to_tensor().detach()
        shared = shared_slice(other).detach()
        torch.testing.assert_close(shared, whole.mean((0, 1)))
        c = other.expert_factor.detach()
        reached = (c @ torch.linalg.pinv(c)).sum(1)  # of a one for every expert, what C can make
        expected = whole - reached.view(1, -1, 1, 1) * shared
        torch.testing.assert_close(other.to_tensor().detach(), expected)
        if p >= t:
            torch.testing.assert_close(other.to_tensor().detach() + shared, whole)


@pytest.mark.parametrize(
    ("name", "form"), [("bert", "multiplicative"), ("gpt2", "additive"), ("clip", "multiplicative")]
)
def test_a_small_warm_start_from_gradients_lowers_the_loss(name, form):
    batches = batches_for(name, dtype=float64)
    losses = []
    for warm_start in (0.0, 1e-3):
        model = started(name, batches, float64, init_experts="gradient", form=form, warm_start=warm_start)
        with torch.no_grad():
            losses.append(sum(float(model(**batch).loss) for batch in batches))
    assert losses[1] < losses[0]


def test_normalised_cores_start_from_the_decomposition_too():
    """normalize=True has no zero core to start from: it takes that of the decomposition, and divides it."""
    with pytest.warns(UserWarning, match="normalize=True divides a zero core by its norm"):
        model = started(normalize=True)
    for held in experts_of(model).values():
        assert held.core.any() and held.to_tensor().isfinite().all()
    assert router_of(model).initialised
