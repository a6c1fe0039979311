"""Nested k-means: planted groups and experts, bounded groups, and data that hold fewer clusters than were asked for."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tucka.clustering import SLACK, _balanced_labels, nested_kmeans


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _no_numpy_warnings():
    """A mean over nothing is a warning of numpy and NaN from then on."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def planted(rng, groups=3, experts=2, each=12, width=5, noise=0.01):
    """Groups 100 apart, experts of a group 10 apart, members a hundredth apart; rows in random order."""
    corners = 100.0 * np.eye(width)[:groups]
    centres = corners[:, None] + 10.0 * np.eye(width)[None, -experts:]  # (K, T, F)
    rows = np.repeat(centres.reshape(-1, width), each, axis=0)
    rows = rows + noise * rng.standard_normal(rows.shape)
    return centres, rows[rng.permutation(len(rows))]


def nearest(features, centroids):
    """The centroid nearest to every feature, by a slow direct formula."""
    return np.array([np.argmin([np.square(f - c).sum() for c in centroids]) for f in features])


@pytest.mark.parametrize("balanced", [False, True])
def test_planted_groups_and_their_experts_are_found(rng, balanced):
    centres, features = planted(rng)
    found = nested_kmeans(features, 3, 2, balanced=balanced).reshape(3, 2, -1)
    # Every group of rows holds both experts of one planted group, in any order of groups and of experts.
    owners = []
    for group in found:
        distances = np.linalg.norm(group[:, None, None] - centres[None], axis=-1)  # (T found, K, T)
        assert (distances.reshape(2, -1).min(1) < 0.02).all()
        owner, expert = np.unravel_index(distances.reshape(2, -1).argmin(1), centres.shape[:2])
        assert owner[0] == owner[1] and set(expert) == {0, 1}
        owners.append(owner[0])
    assert sorted(owners) == [0, 1, 2]


def test_centroids_are_the_means_of_their_members(rng):
    """k-means ends at a fixed point: inside its group, every expert's centroid is the mean of what is nearest to it."""
    _, features = planted(rng, noise=1.0)
    centroids = nested_kmeans(features, 3, 2)
    members = nearest(features, centroids)
    for index, centroid in enumerate(centroids):
        np.testing.assert_allclose(features[members == index].mean(0), centroid, atol=1e-9)


@pytest.mark.parametrize("balanced", [False, True])
def test_fewer_features_than_centroids_are_refused(rng, balanced):
    with pytest.raises(ValueError, match=r"calibration gives 7 features to find k·t=4·2 centroids in; give more"):
        nested_kmeans(rng.standard_normal((7, 3)), 4, 2, balanced=balanced)


@pytest.mark.parametrize("balanced", [False, True])
def test_exactly_as_many_features_as_centroids(rng, balanced):
    found = nested_kmeans(rng.standard_normal((8, 3)), 4, 2, balanced=balanced)
    assert found.shape == (8, 3) and np.isfinite(found).all()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_identical_features_still_give_every_centroid(rng, balanced, distinct):
    """Fewer distinct features than groups leave groups without members; their centroids lie among the features."""
    points = rng.standard_normal((distinct, 3))
    features = points[np.arange(20) % distinct]
    found = nested_kmeans(features, 4, 2, balanced=balanced)
    assert found.shape == (8, 3) and np.isfinite(found).all()
    assert (found >= points.min(0) - 1e-9).all() and (found <= points.max(0) + 1e-9).all()
    if not balanced:  # every distinct feature is met by a centroid
        assert np.linalg.norm(points[:, None] - found[None], axis=-1).min(1).max() < 1e-9


def test_identical_members_of_one_group(rng):
    """A group with fewer distinct members than experts fills up with its mean, not with that of another group."""
    features = np.concatenate([np.full((10, 3), 50.0), rng.standard_normal((10, 3))])
    found = nested_kmeans(features, 2, 3).reshape(2, 3, 3)
    of_copies = found[np.argmax(found[:, 0, 0])]
    np.testing.assert_allclose(of_copies, 50.0)
    assert np.abs(found).min() < 50 and len(np.unique(found.reshape(6, 3), axis=0)) == 4


def sizes(labels, clusters):
    return np.bincount(labels, minlength=clusters)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    clusters=st.integers(2, 5),
    count=st.integers(10, 90),
    skew=st.floats(0.5, 0.95),
)
def test_no_balanced_group_exceeds_the_bound(seed, clusters, count, skew):
    """Most of the data in one tight clump: plain k-means would give it to one group."""
    rng = np.random.default_rng(seed)
    clumped = rng.random(count) < skew
    features = np.where(clumped[:, None], 0.01, 3.0) * rng.standard_normal((count, 4)) + 10.0 * ~clumped[:, None]
    labels = _balanced_labels(features, clusters)
    assert set(labels) <= set(range(clusters))
    assert sizes(labels, clusters).max() <= np.ceil(SLACK * count / clusters)


def test_balance_changes_skewed_groups_and_leaves_even_ones_alone(rng):
    skewed = np.concatenate([0.01 * rng.standard_normal((60, 2)), 10 + rng.standard_normal((12, 2))])
    plain, bounded = (nested_kmeans(skewed, 3, 1, balanced=balanced) for balanced in (False, True))
    assert sizes(nearest(skewed, plain), 3).max() == 60
    assert np.linalg.norm(plain - bounded) > 0.1
    _, even = planted(rng)
    plain, bounded = (nested_kmeans(even, 3, 2, balanced=balanced) for balanced in (False, True))
    np.testing.assert_allclose(np.sort(plain, axis=0), np.sort(bounded, axis=0), atol=1e-9)


@pytest.mark.parametrize("balanced", [False, True])
def test_the_same_features_give_the_same_centroids(rng, balanced):
    features = rng.standard_normal((40, 6))
    before = np.random.get_state()
    first = nested_kmeans(features, 3, 2, balanced=balanced)
    after = np.random.get_state()
    assert np.array_equal(before[1], after[1]) and before[2:] == after[2:], "numpy's own stream is left alone"
    np.random.rand(5)
    np.testing.assert_array_equal(nested_kmeans(features.copy(), 3, 2, balanced=balanced), first)
