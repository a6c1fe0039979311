"""Writing experts and routers of other sizes in place, with what an optimiser remembers of them.

Parameters stay the objects they are, so whoever holds them (an optimiser, a scheduler) keeps them. An optimiser built
before that is not carried along (`optimizer=`) holds moments of the old shapes, and torch refuses its next step.

Shape legend: K groups, T experts in a group, D and O the D-modes, P and R ranks, H width of a core's diagonal blocks
(see `tucka.ops`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

import tensorly as tl
import torch
from torch import Tensor, nn

from .. import ops
from ..columns import joined
from ..mixing import weigh_cores, weigh_slices
from ..model import layers_of
from ..processes import is_distributed
from ..tensors import ExpertTensor

SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta")
"""State entries of torch's optimisers that hold squares of what they average."""

FACTORS = {"input_factor": "held_input", "output_factor": "held_output"}
"""D-mode factors, and the buffers of their columns that do not train."""

Maps = dict[str, Optional[dict[int, Tensor]]]
"""Of every parameter, the matrix (new, old) that its gradient is multiplied by along each mode; None: it forgets."""


class Parts(NamedTuple):
    """Experts of one layer as they shall act, and how gradients follow; factors of another layer are None."""

    core: Tensor  # (K, P, R, H)
    expert_factor: Tensor  # (T, P)
    input_factor: Optional[Tensor]  # (D, R)
    output_factor: Optional[Tensor]  # (O, R)
    shared_core: Optional[Tensor]  # (R, H)
    maps: Maps


def largest_core(parts: Parts) -> float:
    """The largest norm of a core of a group, or of the shared slice, over √R: "bounded" cores stay below 1."""
    norms = parts.core.square().sum((1, 2, 3)).sqrt()
    shared = norms[:0] if parts.shared_core is None else parts.shared_core.square().sum().sqrt().view(1)
    return float(torch.cat([norms, shared]).max() / parts.core.shape[-2] ** 0.5)


# --- what an optimiser remembers -------------------------------------------------------------------------------------


def unwrapped(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimiser inside accelerate's wrapper.

    Raises
    ------
    ValueError
        If it is no torch optimiser, or runs in several processes.
    """
    if optimizer is None:
        return None
    from accelerate.optimizer import AcceleratedOptimizer  # PEFT needs it, but only training does here

    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer={optimizer!r} is no torch optimizer, so its state cannot be carried over")
    if is_distributed():
        raise ValueError("shapes cannot change under a distributed optimizer; change ranks before training is prepared")
    return optimizer


def _mapped(state: Tensor, maps: dict[int, Tensor], squares: bool) -> Tensor:
    matrices = [(matrix.square() if squares else matrix).to(state) for matrix in maps.values()]
    with tl.backend_context("pytorch", local_threadsafe=True):
        return tl.tenalg.multi_mode_dot(state, matrices, modes=list(maps)) if matrices else state.clone()


class Carried:
    """The state of one parameter, taken up before it changes and put down after.

    Parameters
    ----------
    optimizer : Optimizer, optional
    parameter : Tensor
    scale : Tensor, () or broadcast to the parameter
        What it is multiplied by when it acts.
    maps : dict
        Matrices of its modes; see `Maps`. None forgets the state.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer | None, parameter: Tensor, scale: Tensor, maps: dict[int, Tensor] | None
    ) -> None:
        self.parameter = parameter
        # Reading optimizer.state[parameter] would make an entry, which changes what the optimiser saves.
        self.state: dict[str, Any] = {} if optimizer is None else optimizer.state.get(parameter, {})  # type: ignore[call-overload]
        self.kept: dict[str, Optional[tuple[Tensor, bool]]] = {}
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        for key, entry in self.state.items():
            if isinstance(entry, Tensor) and entry.ndim and entry.shape == parameter.shape:
                squares = key in SQUARES
                if maps is None:
                    self.kept[key] = None
                else:
                    self.kept[key] = (
                        _mapped(entry / (scale**2 if squares else scale).to(entry), maps, squares),
                        squares,
                    )

    def put_down(self, scale: Tensor) -> None:
        """Write the state for the parameter as it now is."""
        for key, kept in self.kept.items():
            if kept is None:
                self.state[key] = torch.zeros_like(self.parameter)
            else:
                entry, squares = kept
                self.state[key] = (entry * (scale**2 if squares else scale).to(entry)).contiguous()


# --- writing ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def put(held: Tensor, value: Tensor) -> None:
    """Give a parameter or buffer another value, of any shape."""
    value = value.detach().to(held).contiguous().clone()
    held.grad = None
    if held.shape != value.shape:
        # A tensor of another type in between lets autograd forget the shape it knows for gradients.
        other = torch.float32 if held.dtype == torch.float16 else torch.float16
        held.data = torch.empty(0, dtype=other, device=held.device)
    held.data = value


def write_experts(
    experts: ExpertTensor, parts: Parts, normalize: bool | str, optimizer: torch.optim.Optimizer | None
) -> None:
    """Let experts act as given from now on, whatever sizes they had.

    A state of Adam follows as the gradient would. Its first moment exactly, up to the part of a factor's gradient that
    came through dropped columns, and up to what a norm takes away from a gradient along the parameter; its second
    exactly where columns, groups or experts are selected, and as if entries varied independently where they are mixed.
    """
    own = _own(experts)
    before = _scales(experts)
    carried = {name: Carried(optimizer, held, before[name], parts.maps.get(name, {})) for name, held in own.items()}
    forgotten = [Carried(optimizer, weight, torch.ones(()), None) for weight in experts.lasso_weights]
    experts.normalize = normalize
    core, shared = parts.core.double(), parts.shared_core
    if normalize == "bounded":
        core = ops.unscale_core(core, (1, 2, 3), experts.core_gain)
        shared = None if shared is None else ops.unscale_core(shared, (0, 1), experts.core_gain)
    new = dict(parts._asdict(), core=core, shared_core=shared)
    for name, held in own.items():
        if new[name] is not None and name not in FACTORS:
            put(held, new[name])
    for name, rest in FACTORS.items():
        if name in own and new[name] is not None:
            _put_factor(experts, name, rest, new[name])
    sizes = dict(lasso_expert=core.shape[1], lasso_input=core.shape[2], lasso_output=core.shape[2])
    for name, weight in (("lasso_expert", experts.lasso_expert), ("lasso_input", experts.lasso_input),
                         ("lasso_output", experts.lasso_output)):  # fmt: skip
        if weight is not None:
            put(weight, weight.new_ones(sizes[name]))
    experts._rescale_factors_()
    experts.measure_()
    after = _scales(experts)
    for name, state in carried.items():
        state.put_down(after[name])
    for state in forgotten:
        state.put_down(torch.ones(()))


def _put_factor(experts: ExpertTensor, name: str, rest: str, value: Tensor) -> None:
    """Give a factor other columns, those held among them; as many train as before, if there are as many."""
    held = getattr(experts, rest)
    columns = value.shape[1] if held is None else experts.trained_columns
    put(getattr(experts, name), value[:, :columns])
    if held is not None and value.shape[1] > columns:
        put(held, value[:, columns:])
    else:
        experts.register_buffer(rest, None)


@torch.no_grad()
def open_blocks(experts: ExpertTensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Hold full cores, zero beside what were their diagonal blocks; an optimiser remembers as much."""
    for held in (experts.core, experts.shared_core):
        if held is None or held.shape[-2] == held.shape[-1]:
            continue
        state: dict[str, Any] = {} if optimizer is None else optimizer.state.get(held, {})  # type: ignore[call-overload]
        for key, entry in state.items():
            if isinstance(entry, Tensor) and entry.shape == held.shape:
                state[key] = ops.block_diagonal(entry)
        put(held, ops.block_diagonal(held))


def _own(experts: ExpertTensor) -> dict[str, Tensor]:
    names = ("core", "expert_factor", "input_factor", "output_factor", "shared_core")
    return {name: held for name in names if (held := getattr(experts, name)) is not None}


@torch.no_grad()
def _scales(experts: ExpertTensor) -> dict[str, Tensor]:
    """What every parameter is multiplied by when it acts."""
    found = {}
    for name, held in _own(experts).items():
        if name == "core" or name == "shared_core":
            dim = (1, 2, 3) if name == "core" else (0, 1)
            ones = torch.ones_like(held)
            # One multiple for every group; the weights of a lasso then differ from entry to entry.
            factor = held.square().sum(dim, keepdim=True)
            if experts.normalize is True:
                ones = ones * torch.where(factor > 0, factor.rsqrt(), torch.ones_like(factor))
            elif experts.normalize:
                gain = experts.core_gain
                ones = ones * gain * (1 + gain**2 * factor / held.shape[-2]).rsqrt()
            weigh = weigh_cores if name == "core" else weigh_slices
            found[name] = weigh([experts], ones.unsqueeze(0))[0]
        else:
            mode = joined(held, getattr(experts, FACTORS[name])) if name in FACTORS else held
            found[name] = torch.as_tensor(1 / experts._norm(mode), device=held.device)
    return found


def write_config(model: nn.Module, adapter_name: str, **changes: Any) -> None:
    """Replace an adapter's configuration by one with these changes, for the model, its routers and its files.

    A copy, because the user's object may serve other models.
    """
    held: Any = model
    config = copy.copy(held.peft_config[adapter_name])
    for name, value in changes.items():
        setattr(config, name, value)
    held.peft_config[adapter_name] = config
    for layer in layers_of(model):
        routers: Any = layer.tucka_router
        if adapter_name in routers:
            routers[adapter_name].config = config
        if adapter_name in layer.tucka_alpha:
            layer.tucka_alpha[adapter_name] = config.alpha


def one_hot(sources: Iterable[int], size: int) -> Tensor:
    """The matrix (new, old) that selects these entries."""
    return torch.eye(size, dtype=torch.float64)[list(sources)]
