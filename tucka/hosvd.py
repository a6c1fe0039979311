"""Truncated HOSVD of expert tensors, on tensorly: factors that layers share, tied D-modes, experts in every group.

Shape legend: L layers that share factors, K groups, T experts in a group, C = K·T, D and O the D-modes, R and P ranks
(see `tucka.ops`).
"""

from __future__ import annotations

from typing import NamedTuple

import tensorly as tl
import torch
from torch import Tensor

from .moments import Moments
from .ops import safe_norm


class Decomposition(NamedTuple):
    """A tensor (K, T, D, O) as core and factors; the group mode keeps the identity."""

    core: Tensor  # (K, P, R, R)
    expert_factor: Tensor  # (T, P)
    input_factor: Tensor  # (D, R)
    output_factor: Tensor  # (O, R)


def leading_vectors(
    unfoldings: list[Tensor],  # each (n, any)
    rank: int,
) -> Tensor:  # (n, rank)
    """The first left singular vectors of the unfoldings side by side, from their common Gram matrix in float64."""
    gram: Tensor = sum(unfolding.double() @ unfolding.double().mT for unfolding in unfoldings)  # type: ignore[assignment]
    with tl.backend_context("pytorch", local_threadsafe=True):
        return tl.svd_interface(gram, n_eigenvecs=rank)[0][:, :rank].to(unfoldings[0])


def compress_experts(
    projected: Tensor,  # (K, T, R, R)
    rank: int,
) -> tuple[Tensor, Tensor]:  # (K, P, R, R), (T, P)
    """Core and expert factor of a tensor whose D-modes are projected already.

    Of P > T columns the last ones are unit vectors, and their core slices zero.
    """
    experts = projected.shape[1]
    with tl.backend_context("pytorch", local_threadsafe=True):
        factor = leading_vectors([tl.unfold(projected, 1)], min(rank, experts))
        core = tl.tenalg.mode_dot(projected, factor.mT, 1)
    spare = max(rank - experts, 0)
    core = torch.cat([core, core.new_zeros(core.shape[0], spare, *core.shape[2:])], dim=1)
    units = torch.eye(experts, device=factor.device, dtype=factor.dtype)
    return core, torch.cat([factor, units[:, torch.arange(spare) % experts]], dim=1)


def hosvd(
    tensor: Tensor,  # (K, T, D, O)
    rank: tuple[int, int],  # (P, R)
    tied: bool,
) -> Decomposition:
    """Truncated HOSVD of a formed tensor; tied D-modes share the singular vectors of both unfoldings."""
    (decomposition,) = _hosvd_of_slices([tensor], [rank], tied)
    return decomposition


def hosvd_of_moments(
    moments: list[Moments],
    shapes: list[tuple[int, int]],  # (K, T) of every layer
    ranks: list[tuple[int, int]],  # (P, R) of every layer, R the same
    tied: bool,
) -> list[Decomposition]:
    """Truncated HOSVD of the streamed tensors of layers that share their D-mode factors.

    Every layer counts alike: its tensor enters the common factors divided by its norm.
    """
    sides = [[layer.side(mode) for layer in moments] for mode in (0, 1)]
    if tied:
        input_basis = output_basis = _basis(sides[0] + sides[1])
    else:
        input_basis, output_basis = _basis(sides[0]), _basis(sides[1])
    slices = [layer.within(input_basis, output_basis).unflatten(0, shape) for layer, shape in zip(moments, shapes)]
    return [
        part._replace(input_factor=input_basis @ part.input_factor, output_factor=output_basis @ part.output_factor)
        for part in _hosvd_of_slices(slices, ranks, tied)
    ]


def _basis(sides: list[Tensor]) -> Tensor:
    """Orthonormal columns that span the sides: as many as the widest has."""
    columns = max(side.shape[1] for side in sides)
    if columns >= sides[0].shape[0]:
        return torch.eye(sides[0].shape[0], device=sides[0].device, dtype=sides[0].dtype)
    sketch = torch.cat([side / safe_norm(side) for side in sides], dim=1)
    with tl.backend_context("pytorch", local_threadsafe=True):
        return tl.svd_interface(sketch, n_eigenvecs=columns)[0][:, :columns]


def _hosvd_of_slices(
    slices: list[Tensor],  # L times (K, T, D, O)
    ranks: list[tuple[int, int]],
    tied: bool,
) -> list[Decomposition]:
    r = ranks[0][1]
    with tl.backend_context("pytorch", local_threadsafe=True):
        scaled = [tensor / safe_norm(tensor) for tensor in slices]
        rows, columns = ([tl.unfold(tensor, mode) for tensor in scaled] for mode in (2, 3))
        if tied:
            input_factor = output_factor = leading_vectors([*rows, *columns], r)
        else:
            input_factor, output_factor = leading_vectors(rows, r), leading_vectors(columns, r)
        found = []
        for tensor, (p, _) in zip(slices, ranks):
            projected = tl.tenalg.multi_mode_dot(tensor, [input_factor.mT, output_factor.mT], modes=[2, 3])
            found.append(Decomposition(*compress_experts(projected, p), input_factor, output_factor))
    return found
