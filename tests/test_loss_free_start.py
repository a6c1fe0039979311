"""The paper's claim of balance without a loss: at the perturbed start each group is chosen with frequency 1/K.

Centroid 1 is the feature f itself, every other is f + U(−1, 1)·s per entry, so the logits are ‖f‖² for the first
expert of group 0 and ‖f‖² + s ‖f‖/√3 · ξ for the others, ξ nearly standard normal. What decides is ρ = s / (√3 ‖f‖).
The groups from 1 on are exchangeable, so the claim holds among them at every ρ. Group 0 has one logit without noise:
a group's score grows with the difference of its logits, of which group 0 has less (used too little, at small ρ), and
with its largest logit being the only positive one, which noise around zero seldom gives (used too much, at large ρ).
"""

import math

import pytest
import torch

import tucka
from tucka.routing import Router

SEEDS = 200


def feature(width=64):
    return torch.randn(1, width, generator=torch.Generator().manual_seed(7))


def scale_at(rho):
    """`perturb_scale` whose noise on a logit has ρ times the logit's size."""
    return rho * math.sqrt(3) * float(feature().norm())


def frequencies(k, t, rho, seeds=SEEDS):
    """How often each group is chosen for the batch that started the router, over that many starts."""
    config = tucka.TuckAConfig.paper(k=k, t=t, perturb_scale=scale_at(rho))
    f, counts = feature(), torch.zeros(k)
    router = Router(config, f.shape[1])
    for seed in range(seeds):
        torch.manual_seed(seed)
        router.initialised.fill_(False)
        router.start(f)
        with torch.no_grad():
            counts[router(f).group] += 1
    return counts / seeds


def within(found, expected, seeds=SEEDS, deviations=3.0):
    """Whether frequencies are within so many binomial standard deviations."""
    expected = torch.as_tensor(expected)
    return bool(((found - expected).abs() <= deviations * (expected * (1 - expected) / seeds).sqrt() + 1e-9).all())


@pytest.mark.parametrize(("k", "t", "rho"), [(4, 2, 2.4), (2, 2, 1.7), (3, 8, 1.7)])
def test_each_group_is_chosen_alike_where_noise_is_about_twice_the_logit(k, t, rho):
    """The claim as stated, at the width of the perturbation for which it holds."""
    assert within(frequencies(k, t, rho), 1 / k)


@pytest.mark.parametrize(("k", "t", "rho"), [(4, 2, 0.1), (4, 2, 30.0), (8, 4, 0.3)])
def test_groups_but_the_first_are_chosen_alike_at_any_width(k, t, rho):
    found = frequencies(k, t, rho)
    rest = (1 - found[0]) / (k - 1)
    assert within(found[1:], rest.expand(k - 1))


def share_of_the_first(k):
    """P(|ξ₀| > √2 max |ξᵢ|) for T = 2 and ρ → 0: differences of two noisy logits, one in group 0, two elsewhere."""
    x = torch.linspace(0, 8, 20001, dtype=torch.float64)
    density = 2 * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(density * torch.erf(x / 2) ** (k - 1), x))


@pytest.mark.parametrize("k", [2, 4, 8])
def test_a_narrow_perturbation_uses_the_first_group_too_little(k):
    """By 22 % with two groups, by 44 % with four, by 64 % with eight, for T = 2: not what the paper claims."""
    share = share_of_the_first(k)
    assert share * k == pytest.approx({2: 0.78, 4: 0.56, 8: 0.36}[k], abs=0.005)
    found = frequencies(k, 2, 1e-3)
    assert within(found[:1], [share])
    assert within(found[1:], [(1 - share) / (k - 1)] * (k - 1))


@pytest.mark.parametrize("k", [4])
def test_a_wide_perturbation_uses_the_first_group_too_much(k):
    """With T = 2 its chance tends to one half whatever K: it wins whenever its one noisy logit is positive."""
    assert within(frequencies(k, 2, 300.0)[:1], [0.5])


def test_more_experts_in_a_group_hide_the_one_without_noise():
    assert within(frequencies(2, 16, 0.1), 1 / 2)
    assert not within(frequencies(4, 2, 0.1), 1 / 4)


@pytest.mark.parametrize("rho", [1e-3, 0.3, 2.4])
def test_a_single_expert_per_group_always_routes_to_the_first(rho):
    """A logit divided by its own norm is its sign, and the first group's is always positive: the claim needs T > 1."""
    assert torch.equal(frequencies(4, 1, rho, seeds=20), torch.tensor([1.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("affinity", ["cosine", "distance"])
def test_the_fitting_affinities_always_route_to_the_first(affinity):
    """The feature itself is the nearest centroid to the feature: these affinities want a start by k-means."""
    config = tucka.TuckAConfig.paper(k=4, t=2, affinity=affinity, perturb_scale=scale_at(0.3))
    router = Router(config, 64)
    for seed in range(20):
        torch.manual_seed(seed)
        router.initialised.fill_(False)
        router.start(feature())
        assert router(feature()).group.item() == 0
