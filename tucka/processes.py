"""The processes of a distributed run: what all of them take from the first, errors that all raise, and parameters that
each holds a part of.

Every function here that exchanges something is called by every process, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ZERO_MARKS = ("ds_id", "_hp_mapping")
"""Attributes that DeepSpeed gives parameters under ZeRO, stage 3 and stages 1 and 2."""


class OtherProcessError(RuntimeError):
    """Another process of the run raised."""


def is_distributed() -> bool:
    """Whether this process belongs to a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def from_first_process(value: Tensor) -> Tensor:
    """The first process's value, the same in all; the value itself where there is one process."""
    if not is_distributed():
        return value
    require_all_well()
    value = value.contiguous()
    torch.distributed.broadcast(value, 0)
    return value


def mean_over_processes(value: Tensor, weight: int) -> Tensor:
    """The weighted mean of a vector over the processes; the value itself where there is one."""
    if not is_distributed():
        return value
    total = torch.cat([value * weight, value.new_full((1,), float(weight))])
    torch.distributed.all_reduce(total)
    return total[:-1] / total[-1].clamp_min(1)


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum over the processes; its gradient is summed over them as well."""
    return _Sum.apply(value)  # type: ignore[no-any-return]


class _Sum(torch.autograd.Function):
    """The differentiable all-reduce, which torch has under one name or another, each deprecated in some release."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return sum_over_processes(gradients[0])


# --- errors ----------------------------------------------------------------------------------------------------------


@contextmanager
def raising_together() -> Iterator[None]:
    """Let all processes raise if one does, so that none waits for what another will never send.

    Whatever is exchanged inside, `require_all_well` comes before it.
    """
    try:
        yield
        require_all_well()
    except OtherProcessError:
        raise
    except Exception as error:
        _exchanged(f"{type(error).__name__}: {error}")
        raise


def require_all_well() -> None:
    """Raise `OtherProcessError` if another process has raised in `raising_together`."""
    for process, error in enumerate(_exchanged(None)):
        if error is not None:
            raise OtherProcessError(f"process {process} of the distributed run raised {error}")


def _exchanged(error: str | None) -> list[str | None]:
    """What has become of every process: None, or the error it raised."""
    if not is_distributed():
        return [None]
    errors: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    return errors


# --- parameters in parts ---------------------------------------------------------------------------------------------


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds a part of a parameter (FSDP2), which is whole only while its block runs."""
    if type(parameter) in (Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def is_lent(parameter: Tensor, ndim: int) -> bool:
    """Whether a parameter is whole only while its block runs, as FSDP has it (FSDP1 shows a flat part otherwise)."""
    return is_sharded(parameter) or parameter.ndim != ndim


def keeps_writes(parameter: Tensor) -> bool:
    """Whether what is written to a parameter in a forward stays: FSDP lends a copy or a view, DeepSpeed trains one."""
    lent = is_sharded(parameter) or not isinstance(parameter, torch.nn.Parameter)
    # torch.compile traces a look at one attribute, not one at all of them (`vars`).
    return not lent and all(getattr(parameter, mark, None) is None for mark in ZERO_MARKS)


def whole(parameter: Tensor) -> Tensor:
    """A parameter as it is, or gathered from all processes where each holds a part.

    Its gradient is the mean over the processes, as FSDP2's own is.
    """
    if not is_sharded(parameter):
        return parameter
    from torch.distributed.tensor import Partial

    sharded: torch.distributed.tensor.DTensor = parameter  # type: ignore[assignment]
    mesh = sharded.device_mesh
    gathered = sharded.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if gathered.requires_grad:
        gathered.register_hook(lambda gradient: gradient / mesh.size())
    return gathered
