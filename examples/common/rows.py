"""Rows of a dataset in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset


class Rows(Dataset):
    """Columns of equal length, served as rows.

    Parameters
    ----------
    columns : dict
        The model's arguments, labels included: tensors or lists.
    """

    def __init__(self, columns: Mapping[str, Any]) -> None:
        sizes = {name: len(column) for name, column in columns.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"all columns have one entry per row, got {sizes}")
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


def split(labels: Sequence[int] | np.ndarray, shares: Sequence[float | int], seed: int) -> list[np.ndarray]:
    """Indices of several parts of some rows, each with the same shares of every label, and of what is left.

    Parameters
    ----------
    labels : sequence of int
        Of all rows.
    shares : sequence of float or int
        Of the parts: numbers of rows, or shares of all rows.
    seed : int
        Of the draw.
    """
    labels, left, parts = np.asarray(labels), np.arange(len(labels)), []
    for share in shares:
        size = share if isinstance(share, int) else round(share * len(labels))
        left, part = train_test_split(left, test_size=size, random_state=seed, stratify=labels[left])
        parts.append(part)
    return [*parts, left]
