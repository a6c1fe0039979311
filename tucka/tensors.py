"""The experts of one layer as one Tucker tensor.

Shape legend: K groups, T experts in a group, D input features, O output features, P rank shared in a group, R rank of
an expert (see `tucka.ops`).

The tensor 𝒯 ∈ ℝ^{K×T×D×O} has the core 𝒢 ∈ ℝ^{K×P×R×R} and the factors (I_K, C ∈ ℝ^{T×P}, U ∈ ℝ^{D×R}, V ∈ ℝ^{O×R}).
A slice 𝒯[i,j] acts on row vectors; for a column vector it is its transpose, V (Σ_p C[j,p] 𝒢[i,p])ᵀ Uᵀ ∈ ℝ^{O×D}.
"""

from __future__ import annotations

from typing import Any

import tensorly as tl
import torch
from torch import Tensor, nn

from . import ops
from ._tltorch import TuckerTensor


class ExpertTensor(TuckerTensor, name="TuckerExperts"):  # type: ignore[call-arg]
    """A `tltorch.TuckerTensor` whose group mode is fixed to the identity and whose D-modes may be one.

    Only free parameters are registered, each once: `core`, `expert_factor` (C), `input_factor` (U), `output_factor`
    (V, unless tied) and `shared_core` (the always-active slice, if any).

    Parameters
    ----------
    core : Parameter, (K, P, R, R)
    expert_factor : Parameter, (T, P)
    input_factor : Parameter, (D, R), or None with `factors_of`
    output_factor : Parameter, (O, R), or None where it is the input factor
    shared_core : Parameter, (R, R), optional
    factors_of : ExpertTensor, optional
        Take the D-mode factors of that tensor instead of own ones.
    normalize : bool
        Every core slice of a group, C, U, V and the shared slice act divided by their Frobenius norms.
    hold_factors : bool
        The D-mode factors are buffers, never trained.
    """

    def __init__(
        self,
        core: nn.Parameter,
        expert_factor: nn.Parameter,
        input_factor: nn.Parameter | None,
        output_factor: nn.Parameter | None = None,
        *,
        shared_core: nn.Parameter | None = None,
        factors_of: ExpertTensor | None = None,
        normalize: bool = False,
        hold_factors: bool = False,
    ) -> None:
        super(TuckerTensor, self).__init__()  # TuckerTensor's own would register every factor, the tied one twice
        self.core = core
        self.expert_factor = expert_factor
        for factor_name, factor in (("input_factor", input_factor), ("output_factor", output_factor)):
            # A buffer is saved and moved like a parameter, and nothing that trains adapters can train it.
            if hold_factors and factor is not None:
                self.register_buffer(factor_name, factor.data)
            else:
                self.register_parameter(factor_name, factor)
        self.register_parameter("shared_core", shared_core)
        # A tuple hides the module from registration: the parameters stay where they were registered first.
        self._factors_of = (factors_of,)
        self.normalize = normalize
        with tl.backend_context("pytorch", local_threadsafe=True):
            validated = tl.tucker_tensor.TuckerTensor((core, self._raw_factors()))
        self.shape, self.rank = validated.shape, validated.rank
        self.order = len(self.shape)

    @classmethod
    def new(
        cls,
        shape: tuple[int, int, int, int],  # (K, T, D, O)
        rank: tuple[int, int],  # (P, R)
        *,
        tie_factors: bool = False,
        shared_expert: bool = False,
        factors_of: ExpertTensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> ExpertTensor:
        """Zero experts of that shape and rank; with `tie_factors` (needs D = O) both D-modes are one."""
        (k, t, d, o), (p, r) = shape, rank
        if tie_factors and d != o:
            raise ValueError(f"tied factors need equal D-modes, but the experts map {d} features to {o}")

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(size, device=device, dtype=dtype))

        return cls(
            parameter(k, p, r, r),
            parameter(t, p),
            parameter(d, r) if factors_of is None else None,
            parameter(o, r) if factors_of is None and not tie_factors else None,
            shared_core=parameter(r, r) if shared_expert else None,
            factors_of=factors_of,
            **options,
        )

    @classmethod
    def from_tensor(
        cls,
        tensor: Tensor,  # (K, T, D, O)
        rank: tuple[int, int],  # (P, R)
        *,
        tie_factors: bool = False,
        **options: Any,
    ) -> ExpertTensor:
        """Truncated HOSVD of a formed tensor (tensorly); tied D-modes share the singular vectors of both unfoldings."""
        p, r = rank
        with tl.backend_context("pytorch", local_threadsafe=True), torch.no_grad():
            unfoldings = [tl.unfold(tensor, mode) for mode in range(4)]
            expert_factor = _leading_vectors(unfoldings[1], p)
            if tie_factors:
                factor = _leading_vectors(torch.cat([unfoldings[2], unfoldings[3]], dim=1), r)
                factors = [expert_factor, factor, factor]
            else:
                factors = [expert_factor, _leading_vectors(unfoldings[2], r), _leading_vectors(unfoldings[3], r)]
            core = tl.tenalg.multi_mode_dot(tensor, factors, modes=[1, 2, 3], transpose=True)
        parameters = [nn.Parameter(part.contiguous()) for part in (core, *factors[: 2 if tie_factors else 3])]
        return cls(*parameters, **options)

    @property
    def input_mode(self) -> Tensor:
        """U, (D, R), unnormalised."""
        owner = self._factors_of[0] or self
        return owner.input_factor

    @property
    def output_mode(self) -> Tensor:
        """V, (O, R), unnormalised; U where the D-modes are tied."""
        owner = self._factors_of[0] or self
        return owner.input_factor if owner.output_factor is None else owner.output_factor

    @property
    def factors(self) -> list[Tensor]:
        """(I_K, C, U, V) as they act, so divided by their norms with `normalize`."""
        factors = self._raw_factors()
        if self.normalize:
            factors[1:] = [factor / ops.safe_norm(factor) for factor in factors[1:]]
        return factors

    @property
    def decomposition(self) -> tuple[Tensor, list[Tensor]]:
        """Core and factors as they act."""
        return self._acting_core(), self.factors

    def to_tensor(self) -> Tensor:
        """The formed experts (K, T, D, O), without the shared slice; for small layers and tests."""
        with tl.backend_context("pytorch", local_threadsafe=True):
            return tl.tucker_to_tensor(self.decomposition)

    def mix(
        self,
        group: Tensor | None,  # (N,)
        gates: Tensor | None,  # (N, T)
    ) -> Tensor:  # (N, R, R)
        """M of every unit, so that x U M Vᵀ is its update; norms of C, U and V are folded in, so it is R×R work.

        With no route (None) it is the shared slice alone, (1, R, R).
        """
        mix = self._acting_shared_core()
        if group is not None and gates is not None:
            routed = ops.mix_experts(self._acting_core(), self.expert_factor, group, gates)
            if self.normalize:
                routed = routed / ops.safe_norm(self.expert_factor)
            mix = routed if mix is None else routed + mix
        elif mix is None:
            mix = self.core.new_zeros(self.core.shape[-2:])
        if self.normalize:
            mix = mix / (ops.safe_norm(self.input_mode) * ops.safe_norm(self.output_mode))
        return mix if mix.ndim == 3 else mix.unsqueeze(0)

    def identity_(self) -> ExpertTensor:
        """Zero cores, orthonormal factors: no update, yet the cores receive gradient."""
        nn.init.zeros_(self.core)
        if self.shared_core is not None:
            nn.init.zeros_(self.shared_core)
        for factor in self._own_factors():
            nn.init.orthogonal_(factor)
        return self

    def kaiming_(self) -> ExpertTensor:
        """The paper's start: all core slices one Kaiming-uniform(a=√5) matrix, factors the same with fan_out."""
        start = nn.init.kaiming_uniform_(torch.empty_like(self.core[0, 0]), a=5**0.5)
        with torch.no_grad():
            self.core.copy_(start.expand_as(self.core))
            if self.shared_core is not None:
                self.shared_core.copy_(start)
        for factor in self._own_factors():
            nn.init.kaiming_uniform_(factor, a=5**0.5, mode="fan_out")
        return self

    def normal_(self, mean: float = 0, std: float = 1) -> ExpertTensor:
        """Random parameters under which an entry of the formed tensor has that standard deviation."""
        if mean != 0:
            raise ValueError(f"only mean=0 can be drawn in factored form, got mean={mean}")
        parameters = [self.core, *self._own_factors()] + ([] if self.shared_core is None else [self.shared_core])
        terms = self.rank[1] * self.rank[2] * self.rank[3]
        for parameter in parameters:
            nn.init.normal_(parameter, std=(std / terms**0.5) ** 0.25)
        return self

    def __getitem__(self, indices: Any) -> Tensor:
        """Index the formed tensor; experts are mixed in factored form by `mix`, not by indexing."""
        return self.to_tensor()[indices]

    def _own_factors(self) -> list[Tensor]:
        owned = (self.expert_factor, self.input_factor, self.output_factor)
        return [factor for factor in owned if factor is not None]

    def _raw_factors(self) -> list[Tensor]:
        eye = torch.eye(self.core.shape[0], device=self.core.device, dtype=self.core.dtype)
        return [eye, self.expert_factor, self.input_mode, self.output_mode]

    def _acting_core(self) -> Tensor:
        return self.core / ops.safe_norm(self.core, dim=(1, 2, 3), keepdim=True) if self.normalize else self.core

    def _acting_shared_core(self) -> Tensor | None:
        if self.shared_core is None or not self.normalize:
            return self.shared_core
        return self.shared_core / ops.safe_norm(self.shared_core)


def _leading_vectors(unfolding: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of an unfolding."""
    return tl.svd_interface(unfolding, n_eigenvecs=rank)[0][:, :rank]
