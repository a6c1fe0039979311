"""The update's passes over wide tensors, as few as the arithmetic allows.

Of an update only two steps touch anything as wide as the layer: x U reads the input, and + (…) Vᵀ is added to the
output. Left to itself, autograd makes two passes more: it writes the gradient of x U as a tensor of its own and adds it
to the one the base layer sends back, and it writes the output a second time. Here x passes through `project`, which
completes its gradient in place, by one fused product and sum, and `add_update` adds to the output where it lies. Both
write to tensors of others, so `may_overwrite` asks first; where it says no, the plain operations of `tucka.ops` serve.

For backward they keep x, if U is trained, and the (N, S, R) projection. Of a factor of which `columns` train, the
gradient of these alone is computed.

Shape legend: N routed units, S rows of a unit, D and O input and output features, R rank (see `tucka.ops`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from transformers.pytorch_utils import Conv1D

from . import ops

PLAIN_LAYERS = (nn.Linear, Conv1D)
"""Layers whose output, and the gradient of whose input, are new tensors that nobody else holds."""


def may_overwrite(base_layer: nn.Module) -> bool:
    """Whether a layer's output and its input's gradient may be written to: no hook sees them, nothing is traced."""
    if type(base_layer) not in PLAIN_LAYERS:
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    hooks = (
        base_layer._forward_hooks,
        base_layer._forward_pre_hooks,
        base_layer._backward_hooks,
        base_layer._backward_pre_hooks,
    )
    return not any(hooks)


def product_dtype(x: Tensor) -> torch.dtype:
    """The precision a product with x is taken in: autocast's, or else its own."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Products in the precision of their operands: autocast would round what a base layer computed in a wider one."""
    device = x.device.type
    return torch.autocast(device_type=device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def within_range(
    input_mode: Tensor,  # (D, R)
    mix: Tensor,  # (N, R, R)
    output_mode: Tensor,  # (O, R)
) -> tuple[Tensor, Tensor, Tensor]:  # (D, R), (N, R, R), (O, R)
    """U / c, c v M and V / v, whose update is the same: c is the largest column sum of |U|, v the largest entry of |V|.

    No entry of x U / c exceeds the largest of x, and those of (x U) v M are of the update's own size. Those of x U and
    of x U M need not be: they can leave the range of half precision where neither W x nor the update does.
    """
    ones = torch.ones((), device=input_mode.device, dtype=input_mode.dtype)
    c, v = input_mode.detach().abs().sum(0).amax(), output_mode.detach().abs().amax().to(ones)
    c, v = torch.where(c > 0, c, ones), torch.where(v > 0, v, ones)
    return input_mode / c, mix * (c * v), output_mode / v.to(output_mode)


def project(
    x: Tensor,  # (..., D)
    input_factor: Tensor,  # (D, R)
    owned: bool,
    columns: int | None = None,
) -> tuple[Tensor, Tensor]:  # (..., D), (..., R)
    """x, and x U. An `owned` x goes to a layer whose `may_overwrite` holds, and to nothing else."""
    if owned and torch.is_grad_enabled():
        return _Project.apply(x, input_factor, columns)
    return x, x.to(input_factor.dtype) @ input_factor


def add_update(
    onto: Tensor,  # (..., O)
    projected: Tensor,  # (..., R), rows of one unit contiguous
    mix: Tensor,  # (N, R, R)
    output_factor: Tensor,  # (O, R)
    owned: bool,
    overwrite: bool,
    columns: int | None = None,
) -> Tensor:  # (..., O)
    """Onto + ((x U) M) Vᵀ; with `overwrite`, in the memory of an `owned` tensor, which nobody may read any more."""
    if not owned:
        return ops.add_update(onto, projected, mix, output_factor)
    projected = ops.by_unit(projected, mix.shape[0])
    if not torch.is_grad_enabled():  # what autograd asks of every call is a good part of a small one
        return _updated(onto, projected, mix, output_factor, overwrite)
    return _AddUpdate.apply(onto, projected, mix, output_factor, overwrite, columns)


def _updated(onto: Tensor, projected: Tensor, mix: Tensor, output_factor: Tensor, overwrite: bool) -> Tensor:
    return add_product(onto, _rows(torch.bmm(projected, mix)), output_factor.mT, overwrite)


def add_product(
    onto: Tensor,  # (..., O)
    rows: Tensor,  # (rows of onto, R)
    factor: Tensor,  # (R, O)
    overwrite: bool,
) -> Tensor:  # (..., O)
    """One fused product and sum, outside of autograd; with `overwrite`, where `onto` lies."""
    if overwrite:  # a detached tensor shares the version counter: whoever kept `onto` for backward is told
        return _rows(onto.detach()).addmm_(rows, factor).view(onto.shape)
    return torch.addmm(_rows(onto), rows, factor).view(onto.shape)


def add_on_axes(
    x: Tensor,  # (..., D)
    blocks: Tensor,  # (A, A, D/A)
    owned: bool = False,
) -> Tensor:  # (..., D)
    """X + x E in a tensor of its own, `owned` if a layer whose `may_overwrite` holds gets it, and nothing else."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return x + ops.on_axes(x, blocks)
    return _AddOnAxes.apply(x, blocks, owned)


class _AddOnAxes(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor, owned: bool) -> Tensor:  # type: ignore[override]
        ctx.owned = owned
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, blocks)
        return _moved(x, blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, blocks = ctx.saved_tensors
        rows_NAD = grad.reshape(-1, *blocks.shape[1:])
        # Memory that is new costs more than what is written to it, so one piece serves all that follows.
        spare = torch.empty_like(rows_NAD[:, : max(len(blocks) - 1, 1)])
        grad_blocks = None
        if ctx.needs_input_grad[1]:
            grad_blocks, x_NAD = torch.empty_like(blocks), x.reshape(rows_NAD.shape)
            for h, q in product(range(len(blocks)), repeat=2):  # an einsum would take them as strided products
                torch.sum(torch.mul(x_NAD[:, h], rows_NAD[:, q], out=spare[:, 0]), 0, out=grad_blocks[h, q])
        if not ctx.needs_input_grad[0]:
            return None, grad_blocks, None
        transposed = blocks.transpose(0, 1)
        if not ctx.owned:
            return _moved(grad, transposed), grad_blocks, None
        _move_(rows_NAD, transposed, spare)
        return rows_NAD.view(grad.shape), grad_blocks, None


def _moved(
    x: Tensor,  # (..., D)
    blocks: Tensor,  # (A, A, D/A)
) -> Tensor:  # (..., D)
    """X + x E; no tensor is written but the one returned."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x_AD, out_AD = (rows.unflatten(-1, blocks.shape[1:]) for rows in (x, out))
    for q in range(len(blocks)):
        _add_others(torch.mul(x_AD[..., q, :], 1 + blocks[q, q], out=out_AD[..., q, :]), x_AD, blocks, q)
    return out


def _move_(
    rows: Tensor,  # (N, A, D/A)
    blocks: Tensor,  # (A, A, D/A)
    spare: Tensor,  # (N, A − 1, D/A)
) -> None:
    """The same where the rows lie: all but the last are set aside until the last has read the old ones."""
    last = len(blocks) - 1
    for q in range(last):
        _add_others(torch.mul(rows[:, q], 1 + blocks[q, q], out=spare[:, q]), rows, blocks, q)
    _add_others(rows[:, last].mul_(1 + blocks[last, last]), rows, blocks, last)
    if last:
        rows[:, :last].copy_(spare)


def _add_others(onto: Tensor, rows: Tensor, blocks: Tensor, q: int) -> None:
    for h in range(len(blocks)):
        if h != q:
            onto.addcmul_(rows[..., h, :], blocks[h, q])


class _Project(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, input_factor: Tensor, columns: int | None
    ) -> tuple[Tensor, Tensor]:
        ctx.columns = columns
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, input_factor)
        return x.view_as(x), x @ input_factor

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_projected: Tensor) -> tuple:  # type: ignore[override]
        x, input_factor = ctx.saved_tensors
        grad_projected = _rows(grad_projected)
        grad_factor = None
        if ctx.needs_input_grad[1]:
            grad_factor = _padded(grad_projected[:, : ctx.columns].mT @ _rows(x), input_factor.shape[1])
        if not ctx.needs_input_grad[0]:
            return None, grad_factor, None
        return _rows(grad_x).addmm_(grad_projected, input_factor.mT).view(grad_x.shape), grad_factor, None


class _AddUpdate(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        onto: Tensor,
        projected: Tensor,
        mix: Tensor,
        output_factor: Tensor,
        overwrite: bool,
        columns: int | None,
    ) -> Tensor:
        ctx.columns = columns
        ctx.save_for_backward(projected, mix, output_factor)
        return _updated(onto, projected, mix, output_factor, overwrite)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        projected, mix, output_factor = ctx.saved_tensors
        rows = _rows(grad)
        grad_mixed = (rows @ output_factor).view(projected.shape)
        grad_projected = torch.bmm(grad_mixed, mix.mT) if ctx.needs_input_grad[1] else None
        grad_mix = torch.bmm(projected.mT, grad_mixed) if ctx.needs_input_grad[2] else None
        # Mixing again costs less than keeping another tensor of that size.
        grad_factor = None
        if ctx.needs_input_grad[3]:
            mixed = _rows(torch.bmm(projected, mix[..., : ctx.columns]))
            grad_factor = _padded(mixed.mT @ rows, output_factor.shape[1])
        return grad, grad_projected, grad_mix, grad_factor, None, None


def _padded(
    rows: Tensor,  # (columns that train, D)
    rank: int,
) -> Tensor:  # (D, R)
    """The gradient of a factor whose other columns have none."""
    missing = rank - rows.shape[0]
    return (torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows).mT


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
