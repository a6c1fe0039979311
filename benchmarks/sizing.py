"""How many parameters an adapter trains, and the size at which a method trains at least so many."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from torch import nn

from .tasks import Task


def adapter_parameters(model: nn.Module, task: Task) -> int:
    """Count what trains beside the layers that every method trains whole."""
    heads = {"modules_to_save", *task.modules_to_save}
    return sum(
        p.numel() for name, p in model.named_parameters() if p.requires_grad and not heads & set(name.split("."))
    )


def trainable_parameters(model: nn.Module) -> int:
    """Count everything that trains."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def smallest_size(sizes: Sequence[int], parameters: Callable[[int], int], at_least: int) -> int:
    """The first of some growing sizes with at least so many parameters, or the last if none has."""
    return sizes[min(bisect_left(sizes, at_least, key=parameters), len(sizes) - 1)]
