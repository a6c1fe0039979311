"""How alike experts are: cosines, principal angles and CKA, all in factored form.

An expert is the matrix U S Vᵀ (D×O) with S = Σ_p C[j,p] 𝒢[i,p] (R×R). With thin QR decompositions U = Q_U A and
V = Q_V B it has the singular values, norms and inner products of A S Bᵀ (R×R), so nothing of size D×O is formed.

Shape legend: E = K·T experts of a layer, expert j of group i at place i·T + j; R rank, D and O features (see
`tucka.ops`). Experts that hold NaN or infinity are NaN in every measure.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .adapters import Adapter, LayerExperts

SIDES = ("input", "output")

CHUNK = 2**21
"""Numbers that a step of the principal angles holds at once."""


def groups_of(layer: LayerExperts) -> np.ndarray:  # (E,)
    """The group of every expert."""
    return np.repeat(np.arange(layer.groups), layer.experts)


def expert_norms(layer: LayerExperts) -> np.ndarray:  # (E,)
    """Frobenius norm of every expert, without α."""
    return torch.linalg.vector_norm(_square(layer), dim=(1, 2)).numpy()


def expert_similarity(a: LayerExperts, b: LayerExperts | None = None) -> np.ndarray:  # (E_a, E_b)
    """Cosine ⟨𝒯_e, 𝒯_f⟩ / ‖𝒯_e‖‖𝒯_f‖ of experts as matrices, within a layer or between two layers.

    NaN for an expert that is zero.

    Raises
    ------
    ValueError
        If the layers differ in their features.
    """
    b = a if b is None else b
    _require_same_features(a, b)
    gram_U, gram_V = a.input_factor.mT @ b.input_factor, a.output_factor.mT @ b.output_factor
    # ⟨U_a S_e V_aᵀ, U_b S_f V_bᵀ⟩ = ⟨S_e, (U_aᵀ U_b) S_f (V_aᵀ V_b)ᵀ⟩
    turned_FRR = torch.einsum("qs,fst,rt->fqr", gram_U, _flat(b), gram_V)
    products_EF = _flat(a).flatten(1) @ turned_FRR.flatten(1).mT
    return _cosines(products_EF, torch.as_tensor(expert_norms(a)), torch.as_tensor(expert_norms(b)))


def principal_angles(
    a: LayerExperts, b: LayerExperts | None = None, side: str = "input"
) -> np.ndarray:  # (E_a, E_b, R), radians, smallest first
    """Principal angles between the subspaces of ℝᴰ that experts read, or of ℝᴼ that they write.

    A subspace is spanned by the singular vectors whose singular values exceed R·ε times the largest; where those are
    fewer than R, the angles beyond the smaller dimension are NaN. Angles below 1e-7 are not told from 0. A singular
    value decomposition for every pair: for many experts of high rank, `subspace_overlap` costs a thousandth. (Björck
    and Golub, 1973.)

    Raises
    ------
    ValueError
        If the layers differ in their features, or `side` is neither "input" nor "output".
    """
    b = a if b is None else b
    _require_same_features(a, b)
    (vectors_a, dims_a), (vectors_b, dims_b) = _subspaces(a, side), _subspaces(b, side)
    between_RR = _orthonormal(a, side).mT @ _orthonormal(b, side)
    turned_FRR = torch.nan_to_num(between_RR) @ vectors_b
    at_once = max(1, CHUNK // turned_FRR.numel())
    cosines = [
        torch.linalg.svdvals(torch.einsum("erq,frs->efqs", part, turned_FRR)) for part in vectors_a.split(at_once)
    ]
    angles_EFR = torch.cat(cosines).clamp(0, 1).acos()
    smaller_EF = torch.minimum(dims_a.unsqueeze(1), dims_b.unsqueeze(0))
    beyond = torch.arange(angles_EFR.shape[-1]) >= smaller_EF.unsqueeze(-1)
    return angles_EFR.masked_fill(beyond, torch.nan).numpy()


def subspace_overlap(a: LayerExperts, b: LayerExperts | None = None, side: str = "input") -> np.ndarray:  # (E_a, E_b)
    """Mean squared cosine of the principal angles: 1 for one subspace in the other, 0 for orthogonal ones.

    It is ⟨P_e, P_f⟩ over the smaller dimension, with the projectors P onto the subspaces, so it needs no angles.
    """
    b = a if b is None else b
    _require_same_features(a, b)
    (vectors_a, dims_a), (vectors_b, dims_b) = _subspaces(a, side), _subspaces(b, side)
    turned = torch.nan_to_num(_orthonormal(a, side).mT @ _orthonormal(b, side)) @ vectors_b
    products_EF = (vectors_a @ vectors_a.mT).flatten(1) @ (turned @ turned.mT).flatten(1).mT
    smaller_EF = torch.minimum(dims_a.unsqueeze(1), dims_b.unsqueeze(0))
    return torch.where(smaller_EF > 0, products_EF / smaller_EF, torch.nan).numpy()


def output_cka(
    layer: LayerExperts,
    covariance: np.ndarray,  # (R, R)
) -> np.ndarray:  # (E, E)
    """Linear CKA of what experts put out on data, from the covariance Σ of the projected inputs x U.

    With the centred outputs Z_e = X U S_e Vᵀ it is ‖Z_eᵀ Z_f‖² / (‖Z_eᵀ Z_e‖ ‖Z_fᵀ Z_f‖). For Σ = L Lᵀ and
    Y_e = Lᵀ S_e Bᵀ the numerator is ⟨Y_e Y_eᵀ, Y_f Y_fᵀ⟩: the cosine of R×R matrices. (Kornblith et al., 2019,
    arXiv 1905.00414.) NaN for an expert that puts out nothing.

    Raises
    ------
    ValueError
        If the covariance is not (R, R).
    """
    rank, covariance_RR = layer.core.shape[-1], torch.as_tensor(covariance, dtype=torch.float64)
    if covariance_RR.shape != (rank, rank):
        raise ValueError(
            f"the covariance of x U in layer {layer.name!r} is r×r with r={rank}, got shape "
            f"{tuple(covariance_RR.shape)}"
        )
    outputs_ERR = _root(covariance_RR).mT @ _flat(layer) @ _triangle(layer.output_factor).mT
    grams = (outputs_ERR @ outputs_ERR.mT).flatten(1)
    norms = torch.linalg.vector_norm(grams, dim=1)
    return _cosines(grams @ grams.mT, norms, norms)


def group_similarity(adapter: Adapter) -> pd.DataFrame:
    """Mean cosine of every group's experts among themselves and with the experts of other groups, layer by layer.

    Columns ``layer``, ``group``, ``within`` (NaN for a single expert) and ``across`` (NaN for a single group).
    """
    lines = []
    for layer in adapter.layers:
        cosines, groups = expert_similarity(layer), groups_of(layer)
        same_EE = groups[:, None] == groups
        within_EE = np.where(same_EE & ~np.eye(len(groups), dtype=bool), cosines, np.nan)
        across_EE = np.where(same_EE, np.nan, cosines)
        for group in range(layer.groups):
            lines.append((layer.name, group, *(_mean(table[groups == group]) for table in (within_EE, across_EE))))
    return pd.DataFrame(lines, columns=["layer", "group", "within", "across"])


def layer_similarity(adapter: Adapter) -> pd.DataFrame:
    """Mean absolute cosine between the experts of every two layers of equal features.

    Rows and columns are layers; NaN where the features differ.
    """
    names = [layer.name for layer in adapter.layers]
    table = pd.DataFrame(np.nan, index=names, columns=names)
    for row, a in enumerate(adapter.layers):
        for column, b in enumerate(adapter.layers[: row + 1]):
            if _features(a) == _features(b):
                table.iloc[row, column] = table.iloc[column, row] = _mean(np.abs(expert_similarity(a, b)))
    return table


def _features(layer: LayerExperts) -> tuple[int, int]:
    return layer.input_factor.shape[0], layer.output_factor.shape[0]


def _require_same_features(a: LayerExperts, b: LayerExperts) -> None:
    if _features(a) != _features(b):
        raise ValueError(
            f"experts are compared where layers have equal features, but {a.name!r} maps {_features(a)[0]} to "
            f"{_features(a)[1]} and {b.name!r} {_features(b)[0]} to {_features(b)[1]}"
        )


def _flat(layer: LayerExperts) -> Tensor:  # (E, R, R)
    return layer.slices.flatten(0, 1)


def _square(layer: LayerExperts) -> Tensor:  # (E, R, R)
    """A S Bᵀ of every expert."""
    return _triangle(layer.input_factor) @ _flat(layer) @ _triangle(layer.output_factor).mT


def _triangle(factor: Tensor) -> Tensor:  # (R, R)
    return torch.linalg.qr(factor, mode="r").R


def _orthonormal(layer: LayerExperts, side: str) -> Tensor:  # (D or O, R)
    return torch.linalg.qr(layer.input_factor if side == "input" else layer.output_factor).Q


def _root(covariance: Tensor) -> Tensor:
    """L with L Lᵀ = Σ, also for a singular Σ; NaN for one that is not finite."""
    if not covariance.isfinite().all():
        return torch.full_like(covariance, torch.nan)
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()


def _subspaces(layer: LayerExperts, side: str) -> tuple[Tensor, Tensor]:  # (E, R, R), (E,)
    """Singular vectors of every expert in the factor's orthonormal coordinates, zero beyond its rank; and the rank."""
    if side not in SIDES:
        raise ValueError(f"side is one of {', '.join(SIDES)}, got {side!r}")
    square_ERR = _square(layer)
    finite_E11 = square_ERR.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    left_ERR, values_ER, right_ERR = torch.linalg.svd(torch.where(finite_E11, square_ERR, 0.0))
    rank = values_ER.shape[-1]
    keep_ER = values_ER > rank * torch.finfo(torch.float64).eps * values_ER[:, :1]
    vectors_ERR = left_ERR if side == "input" else right_ERR.mT
    return vectors_ERR * keep_ER.unsqueeze(-2), keep_ER.sum(-1)


def _cosines(products: Tensor, norms_a: Tensor, norms_b: Tensor) -> np.ndarray:
    """Inner products over norms; NaN where a norm is 0."""
    norms = torch.outer(norms_a, norms_b)
    return torch.where(norms > 0, products / norms, torch.nan).clamp(-1, 1).numpy()


def _mean(values: np.ndarray) -> float:
    """The mean of what is finite; NaN of nothing."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")
