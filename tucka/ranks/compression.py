"""Compression of trained experts: HOSVD improved by HOOI, over layers that share factors, with the shared slice.

Shape legend: L layers of a family, K groups, T experts in a group, D and O the D-modes, P and R ranks before, p and r
after (see `tucka.ops`). All tensors act as they are, in float64.

What is approximated is, for every layer, the routed experts 𝒯 (K, T, D, O) and the shared slice S (D, O), which the
same U and V carry; every layer counts alike, so its tensors enter divided by their common norm. With thin QR
decompositions of U and V nothing is ever larger than K·T·R². De Lathauwer, De Moor and Vandewalle 2000, "On the best
rank-1 and rank-(R1, …, RN) approximation of higher-order tensors"; `tensorly.decomposition.partial_tucker` has neither
factors shared over tensors nor tied modes, but its unfoldings, mode products and singular vectors are used here.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import tensorly as tl
import torch
from torch import Tensor

from ..hosvd import compress_experts, leading_vectors
from ..ops import safe_norm
from .families import Family

SWEEPS = 30
"""Most sweeps of HOOI; it stops when one gains (almost) nothing."""


class Reduced(NamedTuple):
    """A family's tensors seen through orthonormal bases of U and V."""

    input_basis: Tensor  # (D, m), m = R
    output_basis: Tensor  # (O, n)
    input_triangle: Tensor  # (m, R): U = input_basis · input_triangle
    output_triangle: Tensor  # (n, R)
    routed: list[Tensor]  # L times (K, T, m, n)
    shared: list[Optional[Tensor]]  # L times (m, n)
    tied: bool

    @property
    def norms(self) -> list[Tensor]:
        """Norm of all that a layer holds; 1 for one that holds nothing."""
        return [safe_norm(torch.cat([x.flatten() for x in _all(pair)])) for pair in zip(self.routed, self.shared)]


class Fit(NamedTuple):
    """An approximation of a reduced family."""

    input_factor: Tensor  # (m, r), orthonormal
    output_factor: Tensor  # (n, r)
    cores: list[Tensor]  # L times (K, p, r, r)
    expert_factors: list[Tensor]  # L times (T, p)
    shared: list[Optional[Tensor]]  # L times (r, r)
    errors: list[float]  # relative error of every layer: ‖approximation − tensors‖ / ‖tensors‖


def reduce_family(family: Family) -> Reduced:
    """Take the widths out of a family's tensors."""
    parts = []
    with torch.no_grad(), tl.backend_context("pytorch", local_threadsafe=True):
        for experts in family.experts:
            core, (_, expert_factor, input_factor, output_factor) = experts.decomposition
            parts.append([core.double(), expert_factor.double(), input_factor.double(), output_factor.double()])
        _, _, input_factor, output_factor = parts[0]
        input_basis, input_triangle = torch.linalg.qr(input_factor)
        output_basis, output_triangle = torch.linalg.qr(output_factor)
        triangles = [input_triangle, output_triangle]
        routed = [tl.tenalg.multi_mode_dot(core, [c, *triangles], modes=[1, 2, 3]) for core, c, *_ in parts]
        slices = [experts.shared_slice for experts in family.experts]
        shared = [None if s is None else input_triangle @ s.double() @ output_triangle.mT for s in slices]
    return Reduced(input_basis, output_basis, input_triangle, output_triangle, routed, shared, family.tied)


def fit(reduced: Reduced, rank: int, shared_ranks: list[int], sweeps: int = SWEEPS) -> Fit:
    """Truncated HOSVD, then sweeps of HOOI; the best of all that were met.

    For tied D-modes a sweep of HOOI need not improve (the objective is of degree four in U), so it is kept only if it
    does.
    """
    weighted = [
        (routed / norm, None if shared is None else shared / norm)
        for routed, shared, norm in zip(reduced.routed, reduced.shared, reduced.norms)
    ]
    with torch.no_grad(), tl.backend_context("pytorch", local_threadsafe=True):
        rows = [_unfolded(x, -2) for pair in weighted for x in _all(pair)]
        columns = [_unfolded(x, -1) for pair in weighted for x in _all(pair)]
        if reduced.tied:
            u = v = leading_vectors([*rows, *columns], rank)
        else:
            u, v = leading_vectors(rows, rank), leading_vectors(columns, rank)
        best = _finish(reduced, u, v, shared_ranks)
        for _ in range(sweeps):
            u, v = _sweep(weighted, u, v, rank, shared_ranks, reduced.tied)
            found = _finish(reduced, u, v, shared_ranks)
            gain = _total(best) - _total(found)
            best = found if gain > 0 else best
            if gain <= 1e-12:
                break
    return best


def _sweep(
    weighted: list[tuple[Tensor, Tensor | None]], u: Tensor, v: Tensor, rank: int, shared_ranks: list[int], tied: bool
) -> tuple[Tensor, Tensor]:
    """Each factor anew, given the others."""
    mixed = []
    for (routed, shared), p in zip(weighted, shared_ranks):
        projected = tl.tenalg.multi_mode_dot(routed, [u.mT, v.mT], modes=[2, 3])
        columns = leading_vectors([tl.unfold(projected, 1)], min(p, routed.shape[1]))
        mixed += _all((tl.tenalg.mode_dot(routed, columns.mT, 1), shared))
    right = [_unfolded(x @ v, -2) for x in mixed]
    if tied:
        u = v = leading_vectors([*right, *(_unfolded(x.mT @ u, -2) for x in mixed)], rank)
        return u, v
    u = leading_vectors(right, rank)
    return u, leading_vectors([_unfolded(x.mT @ u, -2) for x in mixed], rank)


def _finish(reduced: Reduced, u: Tensor, v: Tensor, shared_ranks: list[int]) -> Fit:
    """Cores for given factors, and what they leave."""
    cores, expert_factors, errors = [], [], []
    slices: list[Optional[Tensor]] = []
    for routed, shared, norm, p in zip(reduced.routed, reduced.shared, reduced.norms, shared_ranks):
        projected = tl.tenalg.multi_mode_dot(routed, [u.mT, v.mT], modes=[2, 3])
        core, expert_factor = compress_experts(projected, p)
        found = tl.tenalg.multi_mode_dot(core, [expert_factor, u, v], modes=[1, 2, 3])
        left = (found - routed).square().sum()
        slices.append(None if shared is None else u.mT @ shared @ v)
        if shared is not None:
            left = left + (u @ u.mT @ shared @ v @ v.mT - shared).square().sum()
        cores.append(core)
        expert_factors.append(expert_factor)
        errors.append(float(left.sqrt() / norm))
    return Fit(u, v, cores, expert_factors, slices, errors)


def kept_energy(reduced: Reduced, shared_ranks: list[int]) -> list[float]:
    """Energy that a HOSVD of rank 1, 2, … R keeps of the family, in the tensors' own units, for given P."""
    full = fit(reduced, reduced.input_triangle.shape[0], shared_ranks, sweeps=0)
    total = reduced.input_triangle.new_zeros(reduced.input_triangle.shape[0])
    for core, shared in zip(full.cores, full.shared):
        squares = core.square().sum((0, 1)) + (0 if shared is None else shared.square())
        total = total + squares.cumsum(0).cumsum(1).diagonal()
    return [float(value) for value in total]


def _total(found: Fit) -> float:
    return sum(error**2 for error in found.errors)


def _all(pair: tuple[Tensor, Tensor | None]) -> list[Tensor]:
    return [x for x in pair if x is not None]


def _unfolded(x: Tensor, mode: int) -> Tensor:
    """Unfolding along a mode counted from the end, for a stack of slices or a single one."""
    return tl.unfold(x, x.ndim + mode)
