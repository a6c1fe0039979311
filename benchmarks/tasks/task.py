"""What every task of the quality benchmark is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Rows(Dataset):
    """Samples of equal shape, served as the arguments of the model.

    Parameters
    ----------
    fields : dict of str to Tensor
        The model's arguments, labels included; the first dimension of each runs over the samples.
    """

    def __init__(self, fields: dict[str, Tensor]) -> None:
        sizes = {name: len(values) for name, values in fields.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"all fields have one entry per sample, got {sizes}")
        self.fields = fields

    def __len__(self) -> int:
        return len(self.fields["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.fields.items()}

    def take(self, indices) -> Rows:
        """The samples at some indices."""
        return Rows({name: values[torch.as_tensor(indices)] for name, values in self.fields.items()})

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """All samples in order, in batches."""
        for start in range(0, len(self), size):
            yield {name: values[start : start + size] for name, values in self.fields.items()}


class Splits(NamedTuple):
    """One thing for each of the three splits: rows, domains or indices."""

    train: Rows | np.ndarray
    validation: Rows | np.ndarray
    test: Rows | np.ndarray


class Options(NamedTuple):
    """What the builders of tasks read beside the seed.

    Attributes
    ----------
    work : Path
        Directory of pretrained weights and prepared text; whatever is found there is not made again.
    sections : Path, optional
        The file of the task `sections`.
    samples : int, optional
        Upper bound on the samples that a task draws on, for tests; default: the task's own size.
    """

    work: Path
    sections: Path | None = None
    samples: int | None = None


class Task(NamedTuple):
    """A pretrained model, and what to adapt it to.

    Attributes
    ----------
    name : str
        Key of `benchmarks.tasks.TASKS`.
    base : callable
        Returns a fresh copy of the pretrained model, in evaluation mode.
    rows : Splits of Rows
        Training, validation and test samples.
    domains : Splits of ndarray, or None
        Which domain or sub-task each sample is from; no model is told.
    target_modules, modules_to_save : tuple of str
        Layers to adapt, and layers that every method trains whole.
    hits : callable
        (model, batch) to one hit or miss per sample.
    epochs, batch_size : int
        Length of the adaptation.
    chance : float
        Score in percent of the best constant answer.
    """

    name: str
    base: Callable[[], nn.Module]
    rows: Splits
    domains: Splits | None
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    hits: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    epochs: int
    batch_size: int
    chance: float


def class_hits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Whether the highest logit of each sample (N, C) is that of its label (N,)."""
    return model(**batch).logits.argmax(-1) == batch["labels"]


def majority(labels: Tensor) -> float:
    """Share of the commonest label, in percent: the score of the best constant answer."""
    return 100 * labels.unique(return_counts=True)[1].max().item() / len(labels)
