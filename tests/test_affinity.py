"""Affinities that fit clusters: against slow direct formulas, and through a router and its files."""

import math

import pytest
import torch
from conftest import batch_for, build, first_output, router_of
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

import tucka
from tucka import ops
from tucka.clustering import SLACK
from tucka.routing import Router
from tucka.starts import balancing_bias, start_router_from

FITTING = ["cosine", "distance"]
float64 = torch.float64


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=float64)


def softmax(logits):
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def slow_cosine(feature, centroids, temperature):
    """Softmax over all experts of cos(z, c) / τ, entry by entry."""

    def cosine(a, b):
        norms = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
        return sum(v * w for v, w in zip(a, b)) / norms

    return [softmax([cosine(f, c) / temperature for c in centroids.tolist()]) for f in feature.tolist()]


def slow_distance(feature, centroids, temperature, spread):
    """Softmax over all experts of −‖z − c‖² / (τ s²), entry by entry."""

    def squared(a, b):
        return sum((v - w) ** 2 for v, w in zip(a, b))

    return [softmax([-squared(f, c) / (temperature * spread) for c in centroids.tolist()]) for f in feature.tolist()]


def fast(affinity, feature, centroids, groups, temperature, spread=1.0):
    if affinity == "cosine":
        return ops.cosine_affinity(feature, centroids, groups, temperature)
    return ops.distance_affinity(feature, centroids, groups, temperature, torch.tensor(spread, dtype=feature.dtype))


sizes = st.integers(1, 4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=sizes, k=sizes, t=sizes, f=st.integers(1, 6), tau=st.floats(0.05, 3.0), spread=st.floats(0.1, 5.0),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_scores_equal_the_formulas_and_sum_to_one(n, k, t, f, tau, spread, seed):
    feature, centroids = draw(n, f, seed=seed), draw(k * t, f, seed=seed + 100)
    slow = {"cosine": slow_cosine(feature, centroids, tau), "distance": slow_distance(feature, centroids, tau, spread)}
    for affinity, expected in slow.items():
        scores = fast(affinity, feature, centroids, k, tau, spread)
        torch.testing.assert_close(scores.flatten(1), torch.tensor(expected, dtype=float64), rtol=1e-9, atol=1e-12)
        assert scores.shape == (n, k, t)
        torch.testing.assert_close(scores.sum((1, 2)), torch.ones(n, dtype=float64))
        # Expert j of group i is row i·T + j of the centroids.
        assert torch.equal(scores[:, -1, 0], scores.flatten(1)[:, (k - 1) * t])


@pytest.mark.parametrize("affinity", FITTING)
def test_a_lower_temperature_is_sharper_and_keeps_the_order(affinity):
    feature, centroids = draw(5, 8), draw(6, 8, seed=1)
    warm, cold = (fast(affinity, feature, centroids, 3, tau, 8.0).flatten(1) for tau in (1.0, 0.1))
    assert torch.equal(warm.argsort(-1), cold.argsort(-1))
    assert (cold.amax(-1) > warm.amax(-1)).all()
    torch.testing.assert_close(cold, (10 * warm.log()).softmax(-1))


def test_cosine_reads_directions_alone_and_distance_does_not():
    feature, centroids = draw(4, 6), draw(6, 6, seed=1)
    scaled = fast("cosine", 7 * feature, 0.1 * centroids, 3, 0.2)
    torch.testing.assert_close(scaled, fast("cosine", feature, centroids, 3, 0.2))
    assert not torch.allclose(
        fast("distance", 2 * feature, centroids, 3, 1.0), fast("distance", feature, centroids, 3, 1.0)
    )


@pytest.mark.parametrize("affinity", FITTING)
@pytest.mark.parametrize("t", [1, 2])
def test_gradients(affinity, t):
    feature, centroids = draw(3, 4).requires_grad_(), draw(3 * t, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, c: fast(affinity, f, c, 3, 0.5, 2.0), (feature, centroids))


def router(k=3, t=2, width=4, dtype=float64, **fields):
    torch.manual_seed(0)
    return Router(tucka.TuckAConfig(k=k, t=t, pooling="mean", **fields), width, dtype=dtype)


@pytest.mark.parametrize("affinity", [*FITTING, "paper"])
def test_a_single_expert_per_group_trains_the_centroids_unless_the_affinity_is_the_papers(affinity):
    """With T = 1 the paper's gate is σ(±1), a constant; a posterior over all groups moves with every centroid."""
    one = router(k=3, t=1, affinity=affinity, init_router="kaiming")
    route = one(draw(5, 4))
    (gradient,) = torch.autograd.grad(route.gates.sum(), one.centroids)
    assert (gradient.abs().max() > 1e-3) == (affinity != "paper")


@pytest.mark.parametrize("affinity", FITTING)
def test_a_router_centres_and_scales_what_it_scores(affinity):
    features = 5.0 + 3.0 * draw(40, 4) * torch.tensor([1.0, 10.0, 0.1, 2.0], dtype=float64)
    started = router(affinity=affinity, temperature=0.7, init_router="kmeans", components=0)
    start_router_from(started, features)
    torch.testing.assert_close(started.center, features.mean(0))
    deviation = features.std(0, correction=0)
    scale = (deviation * deviation.square().mean().sqrt()).sqrt()
    torch.testing.assert_close(started.scale, scale)
    z = (features - features.mean(0)) / scale
    if affinity == "cosine":
        expected = slow_cosine(z, started.centroids, 0.7)
    else:
        squares = [min((f - c).square().sum() for c in started.centroids.detach()) for f in z]
        torch.testing.assert_close(started.spread, torch.stack(squares).mean())
        expected = slow_distance(z, started.centroids, 0.7, float(started.spread))
    found = started.scores(features).flatten(1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("affinity", FITTING)
def test_the_unit_and_the_offset_of_features_do_not_matter(affinity):
    features = draw(40, 4) * torch.tensor([0.5, 1.0, 5.0, 2.0], dtype=float64)
    moved = 100.0 + 7.0 * features
    routes = []
    for given_features in (features, moved):
        started = router(affinity=affinity, init_router="kmeans")
        start_router_from(started, given_features)
        routes.append(started(given_features))
    assert torch.equal(routes[0].group, routes[1].group)
    torch.testing.assert_close(routes[0].gates, routes[1].gates)


@pytest.mark.parametrize("affinity", FITTING)
def test_an_entry_that_hardly_varies_is_not_blown_up(affinity):
    features = torch.cat([draw(40, 3), 1.0 + 1e-9 * draw(40, 1, seed=1)], dim=1)
    started = router(affinity=affinity, init_router="kmeans")
    start_router_from(started, features)
    shifted = features.clone()
    shifted[:, 3] += 1e-7
    torch.testing.assert_close(started.scores(shifted), started.scores(features), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("start", ["kmeans", "kmeans_balanced", "perturb", "in training"])
@pytest.mark.parametrize("affinity", [*FITTING, "paper"])
def test_constant_features_give_no_nan(affinity, start):
    features = torch.full((12, 4), 3.0)
    started = router(dtype=torch.float32, affinity=affinity, init_router="kmeans" if start == "in training" else start)
    if start in ("perturb", "in training"):
        started.start(features)
    else:
        start_router_from(started, features)
    for seen in (features, features + 1, torch.zeros(2, 4)):
        route = started(seen)
        assert route.scores.isfinite().all()
        (gradient,) = torch.autograd.grad(route.gates.sum(), started.centroids)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("affinity", FITTING)
def test_one_feature_for_every_centroid_gives_no_nan(affinity):
    """Every feature is a centroid then, and the mean distance to the nearest one is zero."""
    corners = 10.0 * torch.eye(4)[:3].repeat_interleave(2, 0)
    features = corners + torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, -1.0]]).repeat(3, 1)
    started = router(dtype=torch.float32, affinity=affinity, init_router="kmeans")
    start_router_from(started, features)
    for seen in (features, features + 1):
        assert started(seen).scores.isfinite().all()
    if affinity == "distance":
        assert started.spread > 0


@pytest.mark.parametrize("components", [0, 16])
@pytest.mark.parametrize("affinity", FITTING)
def test_without_calibration_units_of_the_batch_become_centroids(affinity, components):
    features = 5.0 + draw(12, 4)
    started = router(affinity=affinity, init_router="kmeans", components=components)
    started.start(features)
    z = started.placed(features) if components else (features - features.mean(0)) / features.std(0, correction=0)
    assert torch.cdist(started.centroids.detach(), z).amin(-1).max() < 0.1 * 3.5 * 2  # noise of 0.1 per entry
    assert started.initialised and not started.awaits_start


@pytest.mark.parametrize("affinity", FITTING)
def test_the_perturbed_start_is_of_features_as_they_are(affinity):
    features = 5.0 + draw(12, 4)
    started = router(affinity=affinity, init_router="perturb", perturb_scale=0.5)
    started.start(features)
    torch.testing.assert_close(started.centroids[0], features.mean(0))
    spread = (started.centroids[1:] - features.mean(0)).abs()
    assert 0.25 < spread.max() <= 0.5
    assert not started.center.any() and torch.equal(started.scale, torch.ones(4, dtype=float64))
    scores = started.scores(features)
    torch.testing.assert_close(scores.sum((1, 2)), torch.ones(12, dtype=float64))


CASES = [("cosine", "kmeans"), ("distance", "kmeans"), ("distance", "kmeans_balanced"), ("paper", "kmeans_balanced")]


@pytest.mark.parametrize(("affinity", "start"), CASES)
def test_started_routers_survive_saving_bit_for_bit(affinity, start, tmp_path):
    batch = batch_for("bert", samples=12)
    config = tucka.TuckAConfig(r=4, k=3, affinity=affinity, init_router=start, init_experts="kaiming")
    model = tucka.apply(build("bert"), config, calibration=[batch], progress=False).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    held, read = router_of(model).state_dict(), router_of(again).state_dict()
    fitting = {"center", "axes", "spread"} if affinity != "paper" else set()
    assert held.keys() == read.keys() >= {"centroids", "initialised", *fitting}
    assert all(torch.equal(value, read[key]) for key, value in held.items())
    with torch.no_grad():
        assert torch.equal(first_output(model(**batch)), first_output(again(**batch)))


@pytest.mark.parametrize("affinity", [*FITTING, "paper"])
def test_the_bias_of_a_balanced_start_holds_the_routes_to_the_bound(affinity):
    """Skewed features: without the bias one group takes nearly all of them."""
    generator = torch.Generator().manual_seed(0)
    features = torch.cat([torch.randn(90, 4, generator=generator), 4 + torch.randn(10, 4, generator=generator)])
    started = router(k=4, t=2, dtype=torch.float32, affinity=affinity, init_router="kmeans_balanced")
    start_router_from(started, features)
    assert started.balance_bias.sum().abs() < 1e-5
    assert torch.equal(started.balance_bias, started.balance_bias[:, :1].expand(4, 2))  # groups are what is chosen
    load = torch.bincount(started(features).group, minlength=4) / len(features)
    assert load.max() * 4 <= SLACK + 1e-6
    with torch.no_grad():
        route = started(features)
        torch.testing.assert_close(route.gates, route.scores[torch.arange(100), route.group])


def test_the_balancing_bias_of_even_loads_is_zero():
    scores = torch.eye(3).repeat(4, 1).unsqueeze(-1)
    assert not balancing_bias(scores).any()
