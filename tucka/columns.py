"""D-mode factors in two parts: the leading columns, which train, and the others, which are held.

Shape legend: D features, R rank (see `tucka.ops`), Q columns that train.
"""

from __future__ import annotations

import torch
from torch import Tensor


def joined(
    trained: Tensor,  # (D, Q)
    held: Tensor | None,  # (D, R − Q)
) -> Tensor:  # (D, R)
    """A D-mode factor of the columns that train and those that are held."""
    return trained if held is None else torch.cat([trained, held], dim=1)


def parts_of(factors: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """All parts of factors that there are."""
    return [part for pair in factors for part in pair if part is not None]


@torch.no_grad()
def split_(whole: Tensor, trained: Tensor, held: Tensor | None) -> None:
    """Write the columns of a factor to the part that trains and the part that is held."""
    trained.copy_(whole[:, : trained.shape[1]])
    if held is not None:
        held.copy_(whole[:, trained.shape[1] :])
