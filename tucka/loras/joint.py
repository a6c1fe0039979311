"""The joint decomposition of a layer's LoRA updates: one U, one V, and a core for each.

Shape legend: K LoRAs (one group each, T = P = 1), D input and O output features of the layer, r the rank of a LoRA,
m ≤ min(D, Σr) and n ≤ min(O, Σr), R the rank of the experts (see `tucka.ops`).

The updates of a layer, stacked, are a tensor 𝒯 (K, D, O) with slices s Aᵀ Bᵀ, never formed: thin QR decompositions of
all Aᵀ side by side and of all B side by side leave (K, m, n), whose truncated HOSVD, improved by HOOI
(`tucka.ranks.compression`), is that of 𝒯. With R columns for the row spaces of all A and the column spaces of all B,
nothing is lost.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorly as tl
import torch
from torch import Tensor

from ..ops import safe_norm
from ..ranks.compression import SWEEPS, Reduced, fit
from .reading import Update

NEGLIGIBLE = 1e-7
"""Singular values below this part of the largest count as zero: they are beyond single precision."""


class Joint(NamedTuple):
    """The experts of one layer, in float64."""

    core: Tensor  # (K, 1, R, R)
    input_factor: Tensor  # U, (D, R), orthonormal
    output_factor: Tensor  # V, (O, R), orthonormal
    errors: tuple[float, ...]  # (K,) ‖U G Vᵀ − s Aᵀ Bᵀ‖ / ‖s Aᵀ Bᵀ‖ of every LoRA; 0 for one without an update here

    @property
    def rank(self) -> int:
        """R."""
        return self.core.shape[-1]


def join(
    updates: list[Update],  # K
    weights: list[float],  # K; how much the relative accuracy of a LoRA counts: 1 / its norm counts all alike
    rank: int | None = None,
) -> Joint:
    """Decompose the updates of one layer jointly, at most at that rank; by default at the least that loses nothing.

    R never exceeds D or O, as U and V have orthonormal columns.
    """
    ranks = [len(update.down) for update in updates]
    input_basis, input_triangle = torch.linalg.qr(torch.cat([update.down.double().mT for update in updates], dim=1))
    output_basis, output_triangle = torch.linalg.qr(torch.cat([update.up.double() for update in updates], dim=1))
    blocks = zip(updates, input_triangle.split(ranks, dim=1), output_triangle.split(ranks, dim=1))
    slices_Kmn = torch.stack([update.scale * a_mr @ b_nr.mT for update, a_mr, b_nr in blocks])
    weight_K11 = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    weighted_K1mn = (weight_K11 * slices_Kmn).unsqueeze(1)
    full = joint_rank(weighted_K1mn)
    triangles = (input_triangle, output_triangle)
    reduced = Reduced(input_basis, output_basis, *triangles, routed=[weighted_K1mn], shared=[None], tied=False)
    chosen = full if rank is None else min(rank, full)
    found = fit(reduced, chosen, [1], sweeps=0 if chosen == full else SWEEPS)
    core_KRR = torch.einsum("kpqr,p->kqr", found.cores[0], found.expert_factors[0][0]) / weight_K11
    left_K = (found.input_factor @ core_KRR @ found.output_factor.mT - slices_Kmn).flatten(1).norm(dim=1)
    return Joint(
        core_KRR.unsqueeze(1),
        input_basis @ found.input_factor,
        output_basis @ found.output_factor,
        tuple((left_K / safe_norm(slices_Kmn, dim=(1, 2))).tolist()),
    )


def joint_rank(slices: Tensor) -> int:  # (K, 1, m, n)
    """The rank R ≤ min(m, n) beyond which factors hold nothing: the larger of the ranks of both unfoldings."""
    with tl.backend_context("pytorch", local_threadsafe=True):
        unfoldings = [tl.unfold(slices, mode) for mode in (2, 3)]
    energies = [torch.linalg.eigvalsh(unfolding @ unfolding.mT) for unfolding in unfoldings]
    needed = max(int((energy > NEGLIGIBLE**2 * energy[-1].clamp_min(0)).sum()) for energy in energies)
    return max(1, min(needed, *slices.shape[2:]))
