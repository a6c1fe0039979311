"""How routing features are placed among centroids: centred, and scaled entry by entry or whitened.

Shape legend: N features, F their length, Q entries of a placed feature (F where they are scaled).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .ops import safe_norm

SAMPLES_PER_AXIS = 8
"""Features that an axis must rest on: whitening blows up directions that few features tell from noise."""

FLATTEST = 1e-4
"""Least variance of a principal component, over the mean of those kept, that is scaled up to one."""


class Placement(NamedTuple):
    """From a feature f to z: (f − μ) / s with a scale, (f − μ) A with axes, f itself with neither.

    Attributes
    ----------
    center : Tensor (F,), optional
        μ.
    scale : Tensor (F,), optional
        s.
    axes : Tensor (F, Q), optional
        A.
    """

    center: Optional[Tensor] = None
    scale: Optional[Tensor] = None
    axes: Optional[Tensor] = None

    def __call__(
        self,
        feature: Tensor,  # (N, F)
    ) -> Tensor:  # (N, Q)
        """Place features."""
        if self.center is None:
            return feature
        centred = feature - self.center
        if self.axes is not None:
            return torch.einsum("nf,fq->nq", centred, self.axes.to(centred.dtype))
        return centred if self.scale is None else centred / self.scale

    def inverse(
        self,
        placed: Tensor,  # (N, Q)
    ) -> Tensor:  # (N, F)
        """The features that lie there; of many, those nearest to the centre."""
        if self.center is None:
            return placed
        if self.axes is not None:
            return self.center + torch.einsum("nq,qf->nf", placed, torch.linalg.pinv(self.axes))
        return self.center + (placed if self.scale is None else placed * self.scale)

    def map(self, function: Callable[[Tensor], Tensor]) -> Placement:
        """Apply a function to every tensor present."""
        return Placement(*(None if part is None else function(part) for part in self))


def standardised(
    feature: Tensor,  # (N, F)
) -> Placement:
    """Divide entries by √(σ σ̄), with σ̄ the root mean square of all σ.

    That is half way between features as they are, where a few wide entries decide, and standardised ones, where entries
    that hardly vary count as much as any.
    """
    mean = feature.mean(0)
    deviation = (feature - mean).square().mean(0).sqrt()
    typical = (safe_norm(deviation) / len(deviation) ** 0.5).clamp_min(1e-6)
    return Placement(mean, (torch.maximum(deviation, 1e-4 * typical) * typical).sqrt())


def whitened(
    feature: Tensor,  # (N, F)
    components: int,
    groups: int,
) -> Placement:
    """Keep the leading principal components, each divided by its standard deviation.

    Of few features only as many as there are groups, or one for each `SAMPLES_PER_AXIS`; the axes left over are zero.
    """
    kept = min(components, max(groups, len(feature) // SAMPLES_PER_AXIS))
    mean = feature.mean(0)
    _, singular, axes_CF = torch.linalg.svd(feature - mean, full_matrices=False)
    variance_Q = singular[:kept].square() / len(feature)
    floor = (FLATTEST * variance_Q.mean()).clamp_min(1e-12)  # features may all be alike
    axes = feature.new_zeros(feature.shape[1], components)
    axes[:, : len(variance_Q)] = (axes_CF[:kept] / torch.maximum(variance_Q, floor).sqrt().unsqueeze(1)).mT
    return Placement(mean, axes=axes)
