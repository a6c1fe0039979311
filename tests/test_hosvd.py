"""Truncated HOSVD against a slow direct eigen-decomposition of the formed tensor."""

import numpy as np
import pytest
import torch

from tucka.hosvd import Decomposition, compress_experts, hosvd, hosvd_of_moments, leading_vectors
from tucka.moments import FormedMoments

float64 = torch.float64


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=float64)


def eigenvectors(gram, rank):
    """Those of the largest eigenvalues, largest first."""
    values, vectors = np.linalg.eigh(gram)
    return vectors[:, np.argsort(values)[::-1][:rank]]


def slow(tensors, ranks, tied):
    """U, V, C and core of tensors (K, T, D, O) that share U and V, by sums over their slices."""
    scaled = [tensor.numpy() / max(np.linalg.norm(tensor), np.finfo(float).tiny) for tensor in tensors]
    slices = [matrix for tensor in scaled for matrix in tensor.reshape(-1, *tensor.shape[2:])]
    rows, columns = sum(y @ y.T for y in slices), sum(y.T @ y for y in slices)
    r = ranks[0][1]
    u, v = (eigenvectors(rows + columns, r),) * 2 if tied else (eigenvectors(rows, r), eigenvectors(columns, r))
    parts = []
    for tensor, (p, _) in zip(tensors, ranks):
        small = np.einsum("ktdo,dq,or->ktqr", tensor.numpy(), u, v)
        c = eigenvectors(np.einsum("ktqr,ksqr->ts", small, small), min(p, small.shape[1]))
        parts.append((np.einsum("ktqr,tp->kpqr", small, c), c, u, v))
    return parts


def assert_same_space(found, expected, tolerance=1e-9):
    found, expected = (np.asarray(basis) for basis in (found, expected))
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, rtol=0, atol=tolerance)


def formed(parts):
    core, c, u, v = (np.asarray(part) for part in parts)
    return np.einsum("kpqr,tp,dq,or->ktdo", core, c, u, v)


def assert_equal(found: Decomposition, expected):
    """The same up to the signs of the vectors: spaces, and the tensor that the parts form."""
    for basis, other in zip(found[1:], expected[1:]):
        assert_same_space(basis, other)
    np.testing.assert_allclose(formed(found), formed(expected), atol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("k", "t", "p", "r"), [(3, 4, 2, 3), (1, 1, 1, 2), (2, 5, 5, 4), (4, 3, 1, 1), (1, 6, 3, 6)])
def test_it_equals_a_direct_eigendecomposition(k, t, p, r, tied):
    tensor = draw(k, t, 7, 7 if tied else 6)
    found = hosvd(tensor, (p, r), tied)
    assert [tuple(part.shape) for part in found] == [(k, p, r, r), (t, p), (7, r), (7 if tied else 6, r)]
    assert_equal(found, slow([tensor], [(p, r)], tied)[0])


def test_tied_modes_weigh_rows_and_columns_alike():
    """A tensor whose rows live in one direction and whose columns in another: U holds both."""
    u, v = torch.eye(5, dtype=float64)[:2]
    tensor = (torch.outer(u, v) * draw(2, 2, 1, 1)).clone()
    found = hosvd(tensor, (2, 2), tied=True)
    assert found.output_factor is found.input_factor
    assert_same_space(found.input_factor, torch.eye(5, dtype=float64)[:, :2])
    torch.testing.assert_close(hosvd(tensor.mT, (2, 2), tied=True).core.mT.abs(), found.core.abs())


def test_singular_vectors_come_largest_first():
    """Truncation to a smaller rank keeps a subset of the columns: factors of a pattern of ranks are nested."""
    tensor = draw(3, 4, 7, 6)
    wide, narrow = hosvd(tensor, (3, 5), False), hosvd(tensor, (2, 2), False)
    for whole, part in zip(wide[2:], narrow[2:]):
        torch.testing.assert_close((whole[:, :2] * part).sum(0).abs(), torch.ones(2, dtype=float64))
    energy = wide.core.square().sum((0, 1, 3))
    assert torch.equal(energy, energy.sort(descending=True).values)


@pytest.mark.parametrize("tied", [False, True])
def test_full_rank_reconstructs_exactly(tied):
    tensor = draw(3, 4, 6, 6)
    found = hosvd(tensor, (4, 6), tied)
    np.testing.assert_allclose(formed(found), tensor, atol=1e-12)
    for basis in found[1:]:
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=float64))


def test_the_group_mode_is_left_alone():
    """The core of a group comes from that group's slices: a group of zeros has a core of zeros."""
    tensor = draw(3, 2, 6, 6)
    tensor[1] = 0
    found = hosvd(tensor, (2, 4), tied=True)
    assert not found.core[1].any() and found.core[0].any() and found.core[2].any()


@pytest.mark.parametrize("p", [3, 4, 7])
def test_more_shared_ranks_than_experts(p):
    """Spare columns are unit vectors, so that they can train, with core slices of zero, so that they add nothing."""
    tensor = draw(2, 3, 6, 5)
    found = hosvd(tensor, (p, 4), False)
    assert found.expert_factor.shape == (3, p) and found.core.shape == (2, p, 4, 4)
    assert not found.core[:, 3:].any()
    torch.testing.assert_close(found.expert_factor[:, 3:].norm(dim=0), torch.ones(p - 3, dtype=float64))
    np.testing.assert_allclose(formed(found), formed(slow([tensor], [(p, 4)], False)[0]), atol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
def test_a_zero_tensor_gives_zero_cores_and_orthonormal_factors(tied):
    found = hosvd(torch.zeros(3, 2, 6, 6), (2, 4), tied)
    assert not found.core.any()
    for basis in found[1:]:
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]))


def moments_of(tensor):
    """Formed moments that hold this tensor (K, T, D, O)."""
    k, t, d, o = tensor.shape
    held = FormedMoments(k * t, d, o, torch.device("cpu"), tensor.dtype)
    held.tensor.copy_(tensor.flatten(0, 1))
    return held


@pytest.mark.parametrize("tied", [False, True])
def test_layers_that_share_factors_count_alike(tied):
    """Their tensors differ in size by orders of magnitude and in the number of groups and experts."""
    tensors = [draw(3, 4, 7, 7), 1e4 * draw(2, 2, 7, 7, seed=1), 1e-4 * draw(1, 1, 7, 7, seed=2)]
    ranks = [(2, 3), (2, 3), (1, 3)]
    found = hosvd_of_moments([moments_of(y) for y in tensors], [tuple(y.shape[:2]) for y in tensors], ranks, tied)
    for parts, expected, tensor in zip(found, slow(tensors, ranks, tied), tensors):
        assert torch.equal(parts.input_factor, found[0].input_factor)
        assert torch.equal(parts.output_factor, found[0].output_factor)
        scale = float(tensor.norm())
        assert_equal(parts._replace(core=parts.core / scale), (expected[0] / scale, *expected[1:]))
    alone = hosvd(tensors[1], (2, 3), tied)
    assert not np.allclose(alone.input_factor @ alone.input_factor.T, found[0].input_factor @ found[0].input_factor.T)


def test_a_silent_layer_takes_nothing_from_those_it_shares_with():
    tensor = draw(3, 2, 7, 7)
    silent = torch.zeros(2, 2, 7, 7, dtype=float64)
    found = hosvd_of_moments([moments_of(silent), moments_of(tensor)], [(2, 2), (3, 2)], [(2, 3), (2, 3)], True)
    assert_equal(found[1], slow([tensor], [(2, 3)], True)[0])
    assert not found[0].core.any()


def test_moments_of_one_layer_are_decomposed_as_their_tensor():
    tensor = draw(3, 4, 7, 6)
    (found,) = hosvd_of_moments([moments_of(tensor)], [(3, 4)], [(2, 3)], False)
    assert_equal(found, hosvd(tensor, (2, 3), False))


def test_single_precision_keeps_single_precision_answers():
    """The Gram matrix squares the spectrum; in float32 directions 1e-4 below the largest would drown in rounding."""
    scales = torch.logspace(0, -5, 6)
    left, right = (torch.linalg.qr(draw(12, 6, seed=seed))[0].float() for seed in (0, 1))
    matrix = left * scales @ right.T
    found = leading_vectors([matrix], 6)
    assert found.dtype == torch.float32
    torch.testing.assert_close((found * left).sum(0).abs(), torch.ones(6), atol=1e-3, rtol=0)


def test_compressing_experts_alone():
    projected = draw(2, 4, 3, 3)
    core, factor = compress_experts(projected, 4)
    torch.testing.assert_close(torch.einsum("kpqr,tp->ktqr", core, factor), projected)
    core, factor = compress_experts(projected, 2)
    expected = eigenvectors(np.einsum("ktqr,ksqr->ts", projected, projected), 2)
    assert_same_space(factor, expected)
