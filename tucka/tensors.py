"""The experts of one layer as one Tucker tensor.

Shape legend: K groups, T experts in a group, D input features, O output features, P rank shared in a group, R rank of
an expert, H width of a core's diagonal blocks (see `tucka.ops`).

The tensor 𝒯 ∈ ℝ^{K×T×D×O} has the core 𝒢 ∈ ℝ^{K×P×R×R} and the factors (I_K, C ∈ ℝ^{T×P}, U ∈ ℝ^{D×R}, V ∈ ℝ^{O×R}).
The matrices of the core may be zero beside diagonal blocks of H×H; then the blocks alone are held, (K, P, R, H).
Beside it there may be an always-active slice whose factors are the axes of the input, E ∈ ℝ^{D×D} of diagonal blocks.
A slice 𝒯[i,j] acts on row vectors; for a column vector it is its transpose, V (Σ_p C[j,p] 𝒢[i,p])ᵀ Uᵀ ∈ ℝ^{O×D}.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorly as tl
import torch
from torch import Tensor, nn

from . import ops
from ._tltorch import TuckerTensor
from .columns import joined, parts_of, split_
from .hosvd import hosvd
from .mixing import acting_cores, mix_layers, shared_slices

FACTOR_ENTRY = 1 / 8
"""Root mean square of the entries of a bounded factor at its start: how fast an optimiser that moves every entry by its
learning rate (Adam) turns the factor, whatever the width."""


class ExpertTensor(TuckerTensor, name="TuckerExperts"):  # type: ignore[call-arg]
    """A `tltorch.TuckerTensor` whose group mode is fixed to the identity and whose D-modes may be one.

    Only free parameters are registered, each once: `core`, `expert_factor` (C), `input_factor` (U), `output_factor`
    (V, unless tied), `shared_core` and `axis_core` (the always-active slices, if any) and the weights of a tensor lasso
    (if any). Where only the leading columns of U and V train, the factors are these, and buffers hold the others.

    Parameters
    ----------
    core : Parameter, (K, P, R, H)
        The diagonal blocks of its matrices, one under the other; H = R for a full core.
    expert_factor : Parameter, (T, P)
    input_factor : Parameter, (D, Q), or None with `factors_of`
        The columns of U that train: all R, unless others are held.
    output_factor : Parameter, (O, Q), or None where it is the input factor
    held_input, held_output : Tensor, (D, R − Q) and (O, R − Q), optional
        The columns of U and V that are held.
    shared_core : Parameter, (R, H), optional
    axis_core : Parameter, (A, A, D/A), optional
        The always-active slice on the input's own axes; see `ops.on_axes`.
    factors_of : ExpertTensor, optional
        Take the D-mode factors of that tensor instead of own ones.
    normalize : {False, True, "bounded"}
        True: the cores of a group, C, U, V and the shared slice act divided by their Frobenius norms. "bounded": U and
        V act as U √R / ‖U‖, C as C √P / ‖C‖, and a core 𝒢 (of a group, or shared) as γ𝒢 / √(1 + ‖γ𝒢‖²/R).
    core_gain : float
        γ of "bounded" cores.
    axis_bound : float, optional
        Bound on the slice on the axes, see `ops.bound_axes`; None: it acts as it is.
    hold_factors : bool
        The D-mode factors are buffers, never trained.
    lasso : float
        Above 0, `lasso_expert` (P), `lasso_input` (R) and, unless tied, `lasso_output` (R) multiply the modes of the
        core and of the shared slice: the weights of tltorch's ``TuckerLasso``; see `tucka.lasso`.
    """

    def __init__(
        self,
        core: nn.Parameter,
        expert_factor: nn.Parameter,
        input_factor: nn.Parameter | None,
        output_factor: nn.Parameter | None = None,
        *,
        held_input: Tensor | None = None,
        held_output: Tensor | None = None,
        shared_core: nn.Parameter | None = None,
        axis_core: nn.Parameter | None = None,
        factors_of: ExpertTensor | None = None,
        normalize: bool | str = False,
        core_gain: float = ops.CORE_GAIN,
        axis_bound: float | None = None,
        hold_factors: bool = False,
        lasso: float = 0.0,
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
        self.register_buffer("held_input", held_input)
        self.register_buffer("held_output", held_output)
        self.register_parameter("shared_core", shared_core)
        self.register_parameter("axis_core", axis_core)
        self.lasso = lasso
        tied = (factors_of or self).output_factor is None
        modes = dict(
            lasso_expert=core.shape[1], lasso_input=core.shape[2], lasso_output=None if tied else core.shape[2]
        )
        for weight_name, size in modes.items():
            weight = nn.Parameter(core.new_ones(size)) if lasso and size is not None else None
            self.register_parameter(weight_name, weight)
        # A tuple hides the module from registration: the parameters stay where they were registered first.
        self._factors_of = (factors_of,)
        self.normalize = normalize
        self.core_gain, self.axis_bound = core_gain, axis_bound
        self.order = 4
        self.measure_()

    @classmethod
    def new(
        cls,
        shape: tuple[int, int, int, int],  # (K, T, D, O)
        rank: tuple[int, int],  # (P, R)
        *,
        block_width: int | None = None,
        trained_columns: int | None = None,
        tie_factors: bool = False,
        shared_expert: bool = False,
        axis_width: int | None = None,
        factors_of: ExpertTensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> ExpertTensor:
        """Zero experts of that shape and rank; with `tie_factors` (needs D = O) both D-modes are one.

        `block_width` is H (default: R), `axis_width` A (default: no such slice); `trained_columns` train (default: R).
        """
        (k, t, d, o), (p, r) = shape, rank
        w, q = block_width or r, r if trained_columns is None else min(trained_columns, r)
        owns_input = factors_of is None
        owns_output = owns_input and not tie_factors
        if tie_factors and d != o:
            raise ValueError(f"tied factors need equal D-modes, but the experts map {d} features to {o}")

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(size, device=device, dtype=dtype))

        def held(width: int) -> Tensor:
            return torch.zeros(width, r - q, device=device, dtype=dtype)

        return cls(
            parameter(k, p, r, w),
            parameter(t, p),
            parameter(d, q) if owns_input else None,
            parameter(o, q) if owns_output else None,
            held_input=held(d) if owns_input and q < r else None,
            held_output=held(o) if owns_output and q < r else None,
            shared_core=parameter(r, w) if shared_expert else None,
            axis_core=parameter(axis_width, axis_width, d // axis_width) if axis_width else None,
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
        with torch.no_grad():
            parts = hosvd(tensor, rank, tied=tie_factors)
        parameters = [nn.Parameter(part.contiguous()) for part in parts[: 3 if tie_factors else 4]]
        return cls(*parameters, **options)

    @property
    def input_mode(self) -> Tensor:
        """U, (D, R), unnormalised."""
        return self.modes()[0]

    @property
    def output_mode(self) -> Tensor:
        """V, (O, R), unnormalised; U where the D-modes are tied."""
        return self.modes()[1]

    @property
    def owner(self) -> ExpertTensor:
        """The tensor that holds this one's D-mode factors."""
        return self._factors_of[0] or self

    @property
    def tied(self) -> bool:
        """Whether both D-modes are one factor."""
        return self.owner.output_factor is None

    def modes(self, whole: Callable[[Tensor], Tensor] = lambda factor: factor) -> tuple[Tensor, Tensor]:
        """U and V, unnormalised; `whole` gathers a factor that processes hold parts of."""
        owner = self.owner
        input_mode = joined(whole(owner.input_factor), owner.held_input)
        if owner.output_factor is None:
            return input_mode, input_mode
        return input_mode, joined(whole(owner.output_factor), owner.held_output)

    @property
    def factors(self) -> list[Tensor]:
        """(I_K, C, U, V) as they act, so divided by their norms with `normalize`."""
        eye, *factors = self._raw_factors()
        return [eye, *(factor / self._norm(factor) for factor in factors)]

    @property
    def decomposition(self) -> tuple[Tensor, list[Tensor]]:
        """Core and factors as they act."""
        return self._acting_core(), self.factors

    @property
    def shared_slice(self) -> Tensor | None:
        """The always-active slice as it acts, (R, R)."""
        slices = shared_slices([self])
        return None if slices is None else ops.block_diagonal(slices[0, 0])

    @property
    def axis_blocks(self) -> Tensor | None:
        """The slice on the axes as it acts, (A, A, D/A); see `tucka.ops.on_axes`."""
        if self.axis_core is None or self.axis_bound is None:
            return self.axis_core
        return ops.bound_axes(self.axis_core, self.axis_bound)

    def to_tensor(self) -> Tensor:
        """The formed experts (K, T, D, O), without the shared slice; for small layers and tests."""
        with tl.backend_context("pytorch", local_threadsafe=True):
            return tl.tucker_to_tensor(self.decomposition)

    def mix(
        self,
        group: Tensor | None,  # (N,)
        gates: Tensor | None,  # (N, T)
        modes: tuple[Tensor, Tensor] | None = None,  # (D, R), (O, R)
    ) -> Tensor:  # (N, R, R)
        """M of every unit, so that x U M Vᵀ is its update; norms of C, U and V are folded in, so it is R×R work.

        With no route (None) it is the shared slice alone, (1, R, R). `modes` are U and V where processes hold parts
        of them, gathered.
        """
        return mix_layers([self], group, gates, None if modes is None else [modes])[0]

    def identity_(self) -> ExpertTensor:
        """Zero cores, orthonormal factors: no update, yet the cores receive gradient."""
        nn.init.zeros_(self.core)
        for always in (self.shared_core, self.axis_core):
            if always is not None:
                nn.init.zeros_(always)
        for trained, held in self._own_factors():
            whole = torch.empty_like(joined(trained.detach(), held))
            split_(nn.init.orthogonal_(whole), trained, held)
        return self._rescale_factors_()

    @torch.no_grad()
    def write_(
        self,
        core: Tensor,  # (K, P, R, H)
        expert_factor: Tensor,  # (T, P)
        input_factor: Tensor | None,  # (D, R); None where another tensor owns it
        output_factor: Tensor | None,  # (O, R); None where another tensor owns it, or it is the input factor
        shared_core: Tensor | None,  # (R, H)
    ) -> ExpertTensor:
        """Copy parts that act as given into the parameters, so that an optimiser built before keeps them."""
        if shared_core is not None:
            shared_core = self._unscaled(shared_core, (0, 1))
        cores = ((self.core, self._unscaled(core, (1, 2, 3))), (self.shared_core, shared_core))
        for parameter, part in (*cores, (self.expert_factor, expert_factor)):
            if parameter is not None and part is not None:
                parameter.copy_(part)
        for trained, held, mode in ((self.input_factor, self.held_input, input_factor),
                                    (self.output_factor, self.held_output, output_factor)):  # fmt: skip
            if trained is not None and mode is not None:
                split_(mode, trained, held)
        for weight in self.lasso_weights:
            weight.fill_(1)
        return self._rescale_factors_()

    def kaiming_(self) -> ExpertTensor:
        """The paper's start: all core slices one Kaiming-uniform(a=√5) matrix, factors the same with fan_out."""
        start = nn.init.kaiming_uniform_(torch.empty_like(self.core[0, 0]), a=5**0.5) / self._core_gain
        with torch.no_grad():
            self.core.copy_(start.expand_as(self.core))
            if self.shared_core is not None:
                self.shared_core.copy_(start)
        for factor in parts_of(self._own_factors()):
            nn.init.kaiming_uniform_(factor, a=5**0.5, mode="fan_out")
        return self._rescale_factors_()

    def normal_(self, mean: float = 0, std: float = 1) -> ExpertTensor:
        """Random parameters under which an entry of the formed tensor has that standard deviation."""
        if mean != 0:
            raise ValueError(f"only mean=0 can be drawn in factored form, got mean={mean}")
        parts = [self.core, *parts_of(self._own_factors())] + ([] if self.shared_core is None else [self.shared_core])
        terms = self.core[0].numel()  # products that an entry of the formed tensor is a sum of
        for part in parts:
            nn.init.normal_(part, std=(std / terms**0.5) ** 0.25)
        if self.axis_core is not None:
            nn.init.normal_(self.axis_core, std=std)
        with torch.no_grad():
            for core in (self.core, self.shared_core):
                if core is not None:
                    core.div_(self._core_gain)
        return self._rescale_factors_()

    def __getitem__(self, indices: Any) -> Tensor:
        """Index the formed tensor; experts are mixed in factored form by `mix`, not by indexing."""
        return self.to_tensor()[indices]

    @torch.no_grad()
    def _rescale_factors_(self) -> ExpertTensor:
        """Factors that act divided by their norms may be stored at any scale."""
        if self.normalize == "bounded":
            for trained, held in self._own_factors():
                whole = joined(trained, held)
                scale = FACTOR_ENTRY * whole.numel() ** 0.5 / ops.safe_norm(whole)
                for part in parts_of([(trained, held)]):
                    part.mul_(scale)
        return self

    def _norm(self, factor: Tensor) -> Tensor | float:
        """What a factor is divided by when it acts; 1 for one with orthonormal columns that is "bounded"."""
        if not self.normalize:
            return 1.0
        norm = ops.safe_norm(factor)
        return norm if self.normalize is True else norm / factor.shape[1] ** 0.5

    def _own_factors(self) -> list[tuple[Tensor, Tensor | None]]:
        """C, and U and V where they are this tensor's own: the columns that train, and those held."""
        modes = (self.input_factor, self.held_input), (self.output_factor, self.held_output)
        return [(self.expert_factor, None), *((trained, held) for trained, held in modes if trained is not None)]

    def _raw_factors(self) -> list[Tensor]:
        eye = torch.eye(self.core.shape[0], device=self.core.device, dtype=self.core.dtype)
        return [eye, self.expert_factor, *self.modes()]

    def _acting_core(self) -> Tensor:
        return ops.block_diagonal(acting_cores([self], self.core.unsqueeze(0))[0])

    def measure_(self) -> None:
        """Set shape and rank by the parts that are held; `ValueError` if they do not fit together (tensorly)."""
        rank, width = self.core.shape[-2:]
        if rank % width:
            raise ValueError(f"the core's rank r={rank} is not a multiple of its blocks' width {width}")
        with tl.backend_context("pytorch", local_threadsafe=True):
            validated = tl.tucker_tensor.TuckerTensor((ops.block_diagonal(self.core.detach()), self._raw_factors()))
        self.shape, self.rank = validated.shape, validated.rank
        held = self.owner.held_input
        self.trained_columns = rank - (0 if held is None else held.shape[1])  # of U and V, unless all are held

    @property
    def lasso_weights(self) -> list[nn.Parameter]:
        """The weights of a tensor lasso: (P,), (R,) and, unless the D-modes are tied, (R,); none without one."""
        weights = (self.lasso_expert, self.lasso_input, self.lasso_output)
        return [weight for weight in weights if weight is not None]

    @property
    def _core_gain(self) -> float:
        return self.core_gain if self.normalize == "bounded" else 1.0

    def _unscaled(self, core: Tensor, dim: tuple[int, ...]) -> Tensor:
        """The core that acts as this one."""
        return ops.unscale_core(core, dim, self.core_gain, least_room=1e-2) if self.normalize == "bounded" else core
