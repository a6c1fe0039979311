"""Multilinear spectra: how much of an expert tensor each of its modes needs.

The singular values of a mode are those of the tensor's unfolding along it. With thin QR decompositions of the factors
they are the singular values of the core multiplied by the triangles, K×T'×R×R, so the tensor is never formed.
(De Lathauwer, De Moor and Vandewalle, 2000: the higher-order SVD.)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import tensorly as tl
import torch

from .adapters import Adapter, LayerExperts

MODES = ("group", "expert", "input", "output")
"""The modes of the expert tensor, of sizes K, T, D and O."""


def multilinear_spectra(layer: LayerExperts) -> dict[str, np.ndarray]:
    """Singular values of every mode of a layer's experts, largest first; the shared slice is not one of them.

    At most as many values as the rank of the mode allows; NaN if the layer holds a value that is not finite.
    """
    factors = [layer.expert_factor, layer.input_factor, layer.output_factor]
    triangles = [torch.linalg.qr(factor, mode="r").R for factor in factors]
    core = torch.einsum("kpqr,tp,dq,or->ktdo", layer.core, *triangles)
    finite = bool(core.isfinite().all())
    with tl.backend_context("pytorch", local_threadsafe=True):
        unfoldings = [tl.unfold(core, mode) for mode in range(len(MODES))]
    return {
        mode: (torch.linalg.svdvals(unfolded).numpy() if finite else np.full(min(unfolded.shape), np.nan))
        for mode, unfolded in zip(MODES, unfoldings)
    }


def effective_rank(values: np.ndarray) -> float:
    """Exponential of the entropy of the shares of energy σ²/Σσ²: n for n equal values, 1 for a single one.

    NaN if nothing is finite and positive. (Roy and Vetterli, 2007, with squared singular values.)
    """
    shares = _shares(values)
    positive = shares[shares > 0]
    return float(np.exp(-(positive * np.log(positive)).sum())) if positive.size else float("nan")


def rank_for_energy(values: np.ndarray, energy: float = 0.9) -> int:
    """Smallest number of leading values that hold a share of the energy Σσ²; 0 if there is no energy.

    Raises
    ------
    ValueError
        If the share is not above 0 and at most 1.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is a share above 0 and at most 1, got {energy}")
    held = np.cumsum(_shares(values))
    return int(np.searchsorted(held, min(energy, held[-1]) - 1e-12) + 1) if held.size and held[-1] > 0 else 0


def layer_spectra(adapter: Adapter) -> pd.DataFrame:
    """Spectra of all layers: ``layer``, ``mode``, ``index`` (from 1), ``value``, ``energy`` (cumulative share)."""
    lines = [
        (layer.name, mode, index, value, energy)
        for layer in adapter.layers
        for mode, values in multilinear_spectra(layer).items()
        for index, (value, energy) in enumerate(zip(values, np.cumsum(_shares(values))), 1)
    ]
    return pd.DataFrame(lines, columns=["layer", "mode", "index", "value", "energy"])


def effective_ranks(adapter: Adapter, energy: float = 0.9) -> pd.DataFrame:
    """How much of its ranks every layer uses.

    Columns ``layer``, ``mode``, ``rank`` (how many singular values there can be), ``effective`` (`effective_rank`) and
    ``for_energy`` (`rank_for_energy`).
    """
    lines = [_ranks_of(layer.name, multilinear_spectra(layer), energy) for layer in adapter.layers]
    columns = ["layer", "mode", "rank", "effective", "for_energy"]
    return pd.DataFrame([line for part in lines for line in part], columns=columns)


def _ranks_of(name: str, by_mode: Mapping[str, np.ndarray], energy: float) -> list[tuple]:
    return [
        (name, mode, len(values), effective_rank(values), rank_for_energy(values, energy))
        for mode, values in by_mode.items()
    ]


def _shares(values: np.ndarray) -> np.ndarray:
    """Shares of the energy; zeros where there is none or it is not finite."""
    squares = np.square(np.asarray(values, dtype=float))
    total = squares.sum()
    return squares / total if np.isfinite(total) and total > 0 else np.zeros_like(squares)
