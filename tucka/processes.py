"""The processes of a distributed run."""

from __future__ import annotations

import torch
from torch import Tensor


def is_distributed() -> bool:
    """Whether this process belongs to a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def from_first_process(value: Tensor) -> Tensor:
    """The first process's value, the same in all; the value itself where there is one process. Every process calls."""
    if not is_distributed():
        return value
    value = value.contiguous()
    torch.distributed.broadcast(value, 0)
    return value
