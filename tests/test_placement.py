"""How features are placed among centroids: against scikit-learn's PCA, and where data leaves nothing to whiten."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score

import tucka
from tucka.placement import Placement, standardised, whitened
from tucka.routing import Router
from tucka.starts import start_router_from


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def started(features, **fields):
    torch.manual_seed(0)
    router = Router(tucka.TuckAConfig(pooling="mean", **fields), features.shape[1], dtype=torch.float64)
    start_router_from(router, features)
    return router


@pytest.mark.parametrize("components", [1, 3, 8])
def test_whitening_is_that_of_scikit_learn(components):
    features = 5.0 + draw(60, 8) @ draw(8, 8, seed=1)
    found = whitened(features, components, groups=8)(features)
    theirs = PCA(components, whiten=True, svd_solver="full").fit_transform(features.numpy())
    theirs = torch.from_numpy(theirs) * (60 / 59) ** 0.5  # which divides by N − 1
    signs = (found * theirs).sum(0).sign()  # of a component nobody can say
    torch.testing.assert_close(found * signs, theirs)


@given(
    st.integers(1, 40), st.integers(1, 6), st.integers(1, 8), st.integers(1, 4), st.sampled_from([0.0, 1e-12, 1.0, 1e6])
)
def test_any_features_are_placed_within_bounds(count, width, components, groups, size):
    """Few features, or features all alike, leave axes of nothing and no number that is none."""
    features = size * draw(count, width) + 3.0
    placement = whitened(features, components, groups)
    placed = placement(features)
    assert placed.shape == (count, components) and placement.axes.isfinite().all()
    assert placed.abs().max() <= count**0.5 + 1e-6
    assert not placed[:, min(count, width, max(groups, count // 8)) :].any()


@pytest.mark.parametrize(
    "place", [standardised, lambda features: whitened(features, 3, 2), lambda features: Placement()]
)
def test_the_inverse_gives_a_feature_that_is_placed_there(place):
    features = draw(40, 5) * torch.tensor([1.0, 9.0, 0.1, 3.0, 1.0], dtype=torch.float64)
    placement = place(features)
    placed = placement(features)[:7]
    torch.testing.assert_close(placement(placement.inverse(placed)), placed)


@pytest.mark.parametrize("affinity", ["cosine", "distance"])
def test_a_rare_sign_among_wide_directions_is_found(affinity):
    """Three kinds differ by a sign a tenth as long as what varies beside it, as one character among many digits."""
    kinds = torch.arange(600) % 3
    features = torch.cat([3.0 * draw(600, 4), torch.eye(3, dtype=torch.float64)[kinds]], dim=1) @ draw(7, 40, seed=1)
    found = {
        components: started(features, k=3, affinity=affinity, components=components)(features).group
        for components in (0, 6)
    }
    agreement = {n: normalized_mutual_info_score(kinds.numpy(), group.numpy()) for n, group in found.items()}
    assert agreement[6] > 0.95 > 0.3 > agreement[0]


def test_what_the_router_of_a_start_holds():
    config = tucka.TuckAConfig(k=3, t=2, components=5)
    router = Router(config, 8)
    assert router.centroids.shape == (6, 5) and router.axes.shape == (16, 5) and router.scale is None
    assert config.placed_size(2) == 4, "no more components than entries"
    for fields in (dict(components=0), dict(init_router="kaiming"), dict(affinity="paper", t=2)):
        config = tucka.TuckAConfig(**{"k": 3, "t": 2, "components": 5, **fields})
        assert config.placed_size(8) == 16 and not config.whitens
        assert Router(config, 8).centroids.shape == (6, 16)


def test_components_below_zero_are_refused():
    with pytest.raises(ValueError, match="components=-1 is not a whole number of at least 0"):
        tucka.TuckAConfig(components=-1)
