"""The expert tensor against tensorly and tltorch."""

import pytest
import tensorly as tl
import tltorch
import torch

from tucka.tensors import ExpertTensor


def random_experts(k=3, t=2, d=6, o=5, p=2, r=4, **options):
    return ExpertTensor.new((k, t, d, o), (p, r), dtype=torch.float64, **options).normal_()


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"o": 6, "tie_factors": True}])
def test_it_is_a_tucker_tensor_that_tensorly_can_form(options):
    experts = random_experts(**options)
    assert isinstance(experts, tltorch.TuckerTensor)
    core, factors = experts.decomposition
    with tl.backend_context("pytorch"):
        formed = tl.tucker_to_tensor((core, factors))
    assert torch.equal(experts.to_tensor(), formed)
    assert experts.shape == tuple(formed.shape) and experts.rank == (3, 2, 4, 4)
    assert torch.equal(factors[0], torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("normalize", [False, True])
def test_the_mix_is_the_gated_sum_of_slices(normalize):
    experts = random_experts(normalize=normalize)
    group, gates = torch.tensor([2, 0]), torch.rand(2, 2, dtype=torch.float64)
    mixed = experts.input_mode @ experts.mix(group, gates) @ experts.output_mode.T
    expected = torch.einsum("nt,ntdo->ndo", gates, experts[group])
    torch.testing.assert_close(mixed, expected)


def test_free_parameters_are_registered_once():
    assert {name for name, _ in random_experts(o=6, tie_factors=True).named_parameters()} == {
        "core", "expert_factor", "input_factor",
    }  # fmt: skip
    owner = random_experts(shared_expert=True)
    assert set(dict(owner.named_parameters())) == {
        "core", "expert_factor", "input_factor", "output_factor", "shared_core",
    }  # fmt: skip
    borrower = random_experts(factors_of=owner)
    assert set(dict(borrower.named_parameters())) == {"core", "expert_factor"}
    assert borrower.input_mode is owner.input_factor and borrower.output_mode is owner.output_factor


def test_held_factors_are_saved_and_never_trained():
    experts = random_experts(hold_factors=True).requires_grad_(True)
    assert set(dict(experts.named_parameters())) == {"core", "expert_factor"}
    assert set(experts.state_dict()) == {"core", "expert_factor", "input_factor", "output_factor"}


def test_tied_modes_need_equal_widths():
    with pytest.raises(ValueError, match="tied factors need equal D-modes, but the experts map 6 features to 5"):
        random_experts(tie_factors=True)


def test_core_and_factors_must_fit():
    part = lambda *size: torch.nn.Parameter(torch.zeros(size))  # noqa: E731
    with pytest.raises(ValueError, match=r"factors\[2\].shape\[1\]=3 but core.shape\[2\]=4"):
        ExpertTensor(part(2, 2, 4, 4), part(3, 2), part(6, 3), part(5, 4))


@pytest.mark.parametrize("tied", [False, True])
def test_from_tensor_is_exact_at_full_rank_and_near_optimal_below(tied):
    generator = torch.Generator().manual_seed(0)
    formed = torch.randn(3, 2, 6, 6 if tied else 5, generator=generator, dtype=torch.float64)
    full = ExpertTensor.from_tensor(formed, (2, 6 if tied else 5), tie_factors=tied)
    if tied:
        torch.testing.assert_close(full.to_tensor(), formed)
    exact = random_experts(k=3, t=4, o=6, p=2, r=3, tie_factors=tied).to_tensor().detach()
    again = ExpertTensor.from_tensor(exact, (2, 3), tie_factors=tied)
    torch.testing.assert_close(again.to_tensor(), exact)
    assert again.input_factor.shape == (6, 3) and (again.output_factor is None) == tied
    gram = again.input_factor.T @ again.input_factor
    torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64))


def test_starts():
    experts = random_experts(o=6, tie_factors=True, shared_expert=True)
    assert experts.identity_() is experts
    assert experts.core.abs().max() == 0 and experts.shared_core.abs().max() == 0
    torch.testing.assert_close(experts.input_factor.T @ experts.input_factor, torch.eye(4, dtype=torch.float64))
    assert experts.kaiming_() is experts
    assert torch.equal(experts.core, experts.core[0, 0].expand_as(experts.core))
    bound = (6 / (1 + 5) / 4) ** 0.5  # Kaiming-uniform, a = √5, fan of 4
    assert 0.5 * bound < experts.core.abs().max() <= bound
    assert experts.input_factor.abs().max() <= (6 / (1 + 5) / 6) ** 0.5  # fan_out of a (6, 4) factor is 6


def test_normal_has_the_entry_deviation_asked_for():
    torch.manual_seed(0)
    formed = torch.stack(
        [random_experts(k=8, t=8, d=16, o=16, p=3, r=4).normal_(std=0.5).to_tensor() for _ in range(30)]
    )
    assert formed.std().item() == pytest.approx(0.5, rel=0.15)
    with pytest.raises(ValueError, match="only mean=0 can be drawn in factored form, got mean=1"):
        random_experts().normal_(mean=1)
