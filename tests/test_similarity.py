"""Similarity of experts and spectra, against direct computations on formed experts in float64."""

import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import similarity as sim
from analysis import spectra as spec
from analysis.adapters import Adapter, LayerExperts
from tucka import TuckAConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not part of what is installed

from benchmarks.live import LiveBytes

F = torch.float64


def a_layer(k=3, t=2, p=2, r=3, d=7, o=5, seed=0, name="layer", tied=False):
    g = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=g, dtype=F)

    u = draw(d, r)
    return LayerExperts(name, draw(k, p, r, r), draw(t, p), u, u if tied else draw(o, r), draw(r, r), 2.0, "additive")


def formed(layer):
    """(E, D, O)."""
    return torch.einsum("ktqr,dq,or->ktdo", layer.slices, layer.input_factor, layer.output_factor).flatten(0, 1)


def an_adapter(*layers):
    return Adapter("a", TuckAConfig(), layers, ())


sizes = st.tuples(*(st.integers(1, 4) for _ in range(4)), st.integers(0, 10))


@settings(max_examples=30, deadline=None)
@given(sizes)
def test_cosines_and_norms_are_those_of_formed_experts(size):
    k, t, p, r, seed = size
    a = a_layer(k, t, p, r, seed=seed)
    flat = formed(a).flatten(1).numpy()
    norms = np.linalg.norm(flat, axis=1)
    np.testing.assert_allclose(sim.expert_norms(a), norms, rtol=1e-10)
    np.testing.assert_allclose(sim.expert_similarity(a), flat @ flat.T / np.outer(norms, norms), atol=1e-10)


def test_cosines_between_layers():
    a, b = a_layer(seed=1), a_layer(k=2, r=2, seed=2)
    flat_a, flat_b = (formed(x).flatten(1).numpy() for x in (a, b))
    norms = np.outer(np.linalg.norm(flat_a, axis=1), np.linalg.norm(flat_b, axis=1))
    np.testing.assert_allclose(sim.expert_similarity(a, b), flat_a @ flat_b.T / norms, atol=1e-10)


@pytest.mark.parametrize("side", sim.SIDES)
def test_principal_angles_are_those_of_formed_experts(side):
    a, b = a_layer(seed=1), a_layer(k=2, seed=2)
    found = sim.principal_angles(a, b, side)
    for e, one in enumerate(formed(a).numpy()):
        for f, other in enumerate(formed(b).numpy()):
            spans = [scipy.linalg.orth(x if side == "input" else x.T, rcond=1e-10) for x in (one, other)]
            expected = np.sort(scipy.linalg.subspace_angles(*spans))
            np.testing.assert_allclose(found[e, f], expected, atol=1e-6)


def test_angles_beyond_the_smaller_rank_are_not_a_number():
    layer = a_layer(k=2, t=1, p=1)
    layer.core[0, 0] = torch.outer(torch.arange(3.0), torch.ones(3)).to(F)  # a rank-one expert
    found = sim.principal_angles(layer)
    assert np.isfinite(found[0, 1]).tolist() == [True, False, False] and np.isfinite(found[1, 1]).all()
    overlap = sim.subspace_overlap(layer)
    assert overlap[0, 0] == pytest.approx(1) and overlap[0, 1] == pytest.approx(np.cos(found[0, 1, 0]) ** 2)


@pytest.mark.parametrize("side", sim.SIDES)
def test_overlap_is_the_mean_squared_cosine_of_the_angles(side):
    a, b = a_layer(seed=1), a_layer(k=2, seed=2)
    np.testing.assert_allclose(
        sim.subspace_overlap(a, b, side), (np.cos(sim.principal_angles(a, b, side)) ** 2).mean(-1), atol=1e-9
    )


def test_512_experts_of_a_wide_layer_need_little_memory():
    layer = a_layer(k=64, t=8, p=4, r=16, d=4096, o=4096)
    measures = [
        sim.expert_similarity,
        sim.subspace_overlap,
        lambda given: sim.output_cka(given, np.eye(16)),
    ]
    for measure in measures:
        with LiveBytes() as live:
            assert measure(layer).shape == (512, 512)
        assert live.peak < 2**28  # 256 MiB; the formed experts would take 64 GiB


def test_angles_are_the_same_in_parts(monkeypatch):
    whole = sim.principal_angles(a_layer())
    monkeypatch.setattr(sim, "CHUNK", 1)
    np.testing.assert_allclose(sim.principal_angles(a_layer()), whole, atol=1e-7)


def test_cka_is_that_of_outputs_on_data():
    layer = a_layer()
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(3), dtype=F)
    projected = x @ layer.input_factor
    found = sim.output_cka(layer, np.cov(projected.numpy().T, bias=True))
    outputs = [(x @ expert).numpy() for expert in formed(layer)]
    centred = [z - z.mean(0) for z in outputs]
    for e, one in enumerate(centred):
        for f, other in enumerate(centred):
            expected = np.linalg.norm(one.T @ other) ** 2
            expected /= np.linalg.norm(one.T @ one) * np.linalg.norm(other.T @ other)
            assert found[e, f] == pytest.approx(expected, abs=1e-9)


def test_group_and_layer_similarity_average_cosines():
    a, b, c = a_layer(seed=1, name="x"), a_layer(seed=2, name="y"), a_layer(d=6, name="z")
    table = sim.group_similarity(an_adapter(a, c))
    cosines = sim.expert_similarity(a)
    first = table.iloc[0]
    assert (first["layer"], first["group"]) == ("x", 0)
    assert first["within"] == pytest.approx(cosines[0, 1]) and first["across"] == pytest.approx(cosines[:2, 2:].mean())
    between = sim.layer_similarity(an_adapter(a, b, c))
    assert between.loc["x", "y"] == pytest.approx(np.abs(sim.expert_similarity(a, b)).mean())
    assert np.isnan(between.loc["x", "z"]) and between.loc["z", "z"] > 0


def test_single_groups_and_experts_have_nothing_to_compare_with():
    table = sim.group_similarity(an_adapter(a_layer(k=1, t=1)))
    assert len(table) == 1 and np.isnan(table["within"][0]) and np.isnan(table["across"][0])


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_experts_that_are_zero_or_not_finite_are_not_a_number(bad):
    layer = a_layer()
    layer.core[1] = bad
    lost = sim.groups_of(layer) == 1
    cosines = sim.expert_similarity(layer)
    assert np.isnan(cosines[lost]).all() and np.isnan(cosines[:, lost]).all()
    assert np.isfinite(cosines[~lost][:, ~lost]).all()
    assert np.isnan(sim.principal_angles(layer)[lost]).all()
    assert np.isnan(sim.output_cka(layer, np.eye(3))[lost]).all()
    assert np.isfinite(sim.group_similarity(an_adapter(layer))["across"].to_numpy()).tolist() == [True, False, True]
    ranks = spec.effective_ranks(an_adapter(layer))
    assert ranks["effective"].isna().all() == (bad != 0.0)


def test_a_factor_that_is_not_finite_spoils_the_layer_alone():
    layer = a_layer()
    layer.input_factor[0, 0] = torch.nan
    assert np.isnan(sim.expert_similarity(layer)).all() and np.isnan(sim.principal_angles(layer)).all()
    assert np.isnan(sim.output_cka(layer, np.full((3, 3), np.nan))).all()
    assert all(np.isnan(values).all() for values in spec.multilinear_spectra(layer).values())


def test_bad_arguments_name_both_numbers():
    with pytest.raises(ValueError, match="'layer' maps 7 to 5 and 'other' 6 to 5"):
        sim.expert_similarity(a_layer(), a_layer(d=6, name="other"))
    with pytest.raises(ValueError, match="side is one of input, output, got 'left'"):
        sim.principal_angles(a_layer(), side="left")
    with pytest.raises(ValueError, match=r"r=3, got shape \(2, 2\)"):
        sim.output_cka(a_layer(), np.eye(2))


# Spectra


@settings(max_examples=30, deadline=None)
@given(sizes)
def test_spectra_are_those_of_the_formed_tensor(size):
    k, t, p, r, seed = size
    layer = a_layer(k, t, p, r, seed=seed)
    tensor = formed(layer).unflatten(0, (k, t)).numpy()
    for mode, (name, values) in enumerate(spec.multilinear_spectra(layer).items()):
        assert name == spec.MODES[mode]
        unfolded = np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
        expected = np.linalg.svd(unfolded, compute_uv=False)
        np.testing.assert_allclose(values, expected[: len(values)], atol=1e-9)
        assert np.all(expected[len(values) :] < 1e-9)


def test_effective_ranks_count():
    assert spec.effective_rank(np.array([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert spec.effective_rank(np.array([5.0, 0.0])) == pytest.approx(1)
    assert np.isnan(spec.effective_rank(np.zeros(2))) and np.isnan(spec.effective_rank(np.array([np.nan, 1.0])))
    values = np.sqrt(np.array([0.6, 0.3, 0.1]))
    assert [spec.rank_for_energy(values, share) for share in (0.5, 0.6, 0.61, 0.9, 1.0)] == [1, 1, 2, 2, 3]
    assert spec.rank_for_energy(np.zeros(3)) == 0
    with pytest.raises(ValueError, match=r"above 0 and at most 1, got 1\.5"):
        spec.rank_for_energy(values, 1.5)


def test_a_known_multilinear_rank_is_found():
    layer = a_layer(k=4, t=3, p=2, r=3)
    layer.core[:, :, 2] = 0  # nothing is read along the third column of U
    table = spec.effective_ranks(an_adapter(layer), energy=1.0).set_index("mode")
    assert table.loc["input", "for_energy"] == 2 and table.loc["expert", "for_energy"] == 2
    long = spec.layer_spectra(an_adapter(layer))
    assert long.groupby("mode")["energy"].max().to_numpy() == pytest.approx(np.ones(4))
    assert long[long["mode"] == "input"]["index"].tolist() == [1, 2, 3]
