"""Streaming moments of a layer: the tensor that its experts start from, formed where it is small, sketched where not.

Shape legend: N rows (tokens), C clusters (K·T: one for each expert), D input features, O features of the other side
(output features, or D again), Q sketched columns, H columns of the core sketch, R rank (see `tucka.ops`).

The tensor is 𝒴[c] = E[x zᵀ | cluster c] ∈ ℝ^{D×O}, an expectation over the samples of a cluster. The sketch follows
the one-pass Tucker sketch of Sun, Guo, Luo, Tropp and Udell (2020, "Low-rank Tucker approximation of a tensor from
streaming data"), with a test matrix that is a Khatri–Rao product over (cluster, feature), as in Sun, Guo, Tropp and
Udell (2018, "Tensor random projection for low memory dimension reduction"):

    for the D-mode, 𝒴₍₃₎ Ω = Σ_c 𝒴[c] Ω diag(ω_c), D×Q; for the core, Φᵀ 𝒴[c] Φ, H×H for each cluster.

With Gaussian test matrices of Q = 2R + 16 columns the expected error of a factor is at most √(1 + R/(Q−R−1)) times the
best one's (Halko, Martinsson and Tropp 2011, theorem 10.5): 1.16 for R = 8.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

FORMED_LIMIT = 512 * 512
"""Largest D·O at which the tensor is formed."""


class Moments(Protocol):
    """Accumulates 𝒴 and yields it seen through bases of its D-modes."""

    def add(self, x: Tensor, z: Tensor, cluster: Tensor, weight: Tensor) -> None:
        """Add rows x (N, D) and z (N, O) of clusters (N,), each with its weight (N,)."""

    def side(self, mode: int) -> Tensor:
        """Columns that span the range of mode 0 (D) or 1 (O): (D or O, any number)."""

    def within(self, input_basis: Tensor, output_basis: Tensor) -> Tensor:
        """𝒴 in orthonormal bases (D, d) and (O, o) of its modes: (C, d, o)."""

    def size(self) -> float:
        """Sum of the absolute values of what is held: 0 if nothing was added, not finite if something added was not."""


class GaussianTests:
    """Gaussian test matrices: one for each width and number of columns, the same in every process."""

    def __init__(self) -> None:
        self._drawn: dict[tuple[int, int], Tensor] = {}

    def matrix(self, rows: int, columns: int, like: Tensor) -> Tensor:  # (rows, columns)
        """Draw a matrix, or return the one drawn before."""
        if (rows, columns) not in self._drawn:
            generator = torch.Generator().manual_seed(rows * 1_000_003 + columns)
            self._drawn[rows, columns] = torch.randn(rows, columns, generator=generator)
        held = self._drawn[rows, columns] = self._drawn[rows, columns].to(like)
        return held


class FormedMoments:
    """The tensor itself, (C, D, O)."""

    def __init__(self, clusters: int, d: int, o: int, device: torch.device, dtype: torch.dtype) -> None:
        self.tensor = torch.zeros(clusters, d, o, device=device, dtype=dtype)

    def add(self, x: Tensor, z: Tensor, cluster: Tensor, weight: Tensor) -> None:
        """Add rows; see `Moments`."""
        x, z = _weighted(x, weight, self.tensor), z.to(self.tensor)
        _add_products(self.tensor, x, z, cluster)

    def size(self) -> float:
        """Sum of absolute values; see `Moments`."""
        return float(self.tensor.abs().sum())

    def side(self, mode: int) -> Tensor:
        """All columns: the identity spans them."""
        return torch.eye(self.tensor.shape[mode + 1], device=self.tensor.device, dtype=self.tensor.dtype)

    def within(self, input_basis: Tensor, output_basis: Tensor) -> Tensor:
        """Project both modes."""
        return torch.einsum("cdo,di,oj->cij", self.tensor, input_basis, output_basis)


class SketchedMoments:
    """Range sketches of both D-modes and a sketch of the core: (D + O)·Q + C·H² numbers, H = 2Q + 1."""

    def __init__(
        self,
        clusters: int,
        d: int,
        o: int,
        rank: int,
        tests: GaussianTests,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.columns = 2 * rank + 16
        self.tests = tests
        wide = 2 * self.columns + 1
        self.input_range = torch.zeros(d, self.columns, device=device, dtype=dtype)
        self.output_range = torch.zeros(o, self.columns, device=device, dtype=dtype)
        self.core = torch.zeros(clusters, wide, wide, device=device, dtype=dtype)

    def add(self, x: Tensor, z: Tensor, cluster: Tensor, weight: Tensor) -> None:
        """Add rows; see `Moments`."""
        x, z = _weighted(x, weight, self.core), z.to(self.core)
        (x_range_NQ, x_core_NH), (z_range_NQ, z_core_NH) = self._tested(x), self._tested(z)
        omega_NQ = self.tests.matrix(self.core.shape[0], self.columns, self.core)[cluster]
        self.input_range.addmm_(x.mT, z_range_NQ * omega_NQ)
        self.output_range.addmm_(z.mT, x_range_NQ * omega_NQ)
        _add_products(self.core, x_core_NH, z_core_NH, cluster)

    def size(self) -> float:
        """Sum of absolute values; see `Moments`."""
        return float(self.input_range.abs().sum())

    def side(self, mode: int) -> Tensor:
        """The range sketch of a mode."""
        return (self.input_range, self.output_range)[mode]

    def within(self, input_basis: Tensor, output_basis: Tensor) -> Tensor:
        """Solve for 𝒴 in the bases from the core sketch Φᵀ𝒴Φ, by least squares in both modes."""
        left = torch.linalg.pinv(self._test_matrix(input_basis.shape[0])[:, self.columns :].mT @ input_basis)
        right = torch.linalg.pinv(self._test_matrix(output_basis.shape[0])[:, self.columns :].mT @ output_basis)
        return torch.einsum("ih,chg,jg->cij", left, self.core, right)

    def _tested(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        tested = rows @ self._test_matrix(rows.shape[-1])
        return tested[:, : self.columns], tested[:, self.columns :]

    def _test_matrix(self, width: int) -> Tensor:
        """(width, Q + H): columns for the range sketch, and independent ones for the core."""
        return self.tests.matrix(width, 3 * self.columns + 1, self.core)


def _add_products(onto: Tensor, x: Tensor, z: Tensor, cluster: Tensor) -> None:
    """Add x zᵀ of every row to the slice of its cluster: onto (C, D, O), x (N, D), z (N, O)."""
    for c in cluster.unique().tolist():
        rows = cluster == c
        onto[c].addmm_(x[rows].mT, z[rows])


def _weighted(x: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    return x.to(like) * weight.to(like).unsqueeze(-1)
