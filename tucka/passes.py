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

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
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
) -> Tensor:  # (..., D)
    """X + x E, with E the slice on the axes (see `ops.on_axes`), in a tensor of its own."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return x + ops.on_axes(x, blocks)
    return _AddOnAxes.apply(x, blocks)


class _AddOnAxes(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, blocks)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for x_NAD, out_NAD in _spans(blocks, x, out):
            _multiply(x_NAD, blocks, out_NAD)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, blocks = ctx.saved_tensors
        wants_x, wants_blocks = ctx.needs_input_grad
        # Memory that is new costs more than what is written to it: the products lie where the gradient of x will.
        out = torch.empty_like(grad, memory_format=torch.contiguous_format)
        by_span = []
        for grad_NAD, x_NAD, out_NAD in _spans(blocks, grad, x if wants_blocks else grad, out):
            if wants_blocks:
                by_span.append(_grad_of_blocks(x_NAD, grad_NAD, blocks, out_NAD))
            if wants_x:
                _multiply(grad_NAD, blocks, out_NAD, transposed=True)
        return out if wants_x else None, torch.stack(by_span).sum(0) if wants_blocks else None


def _multiply(
    rows: Tensor,  # (N, A, D/A)
    blocks: Tensor,  # (A, A, D/A)
    out: Tensor,  # (N, A, D/A)
    transposed: bool = False,
) -> None:
    """Write rows (I + E), or rows (I + E)ᵀ, to `out`."""
    torch.mul(rows, 1 + blocks[0], out=out)
    for shift, source, target in _shifts(len(blocks)):
        reads, adds = (target, source) if transposed else (source, target)
        out[:, adds].addcmul_(rows[:, reads], blocks[shift, target])


def _grad_of_blocks(
    x: Tensor,  # (N, A, D/A)
    grad: Tensor,  # (N, A, D/A)
    blocks: Tensor,  # (A, A, D/A)
    scratch: Tensor,  # (N, A, D/A)
) -> Tensor:  # (A, A, D/A)
    """The gradient of E over these rows; `scratch` is written over."""
    sums = torch.empty_like(blocks)
    torch.mul(x, grad, out=scratch)
    torch.sum(scratch, 0, out=sums[0])
    for shift, source, target in _shifts(len(blocks)):
        torch.mul(x[:, source], grad[:, target], out=scratch[:, target])
        torch.sum(scratch[:, target], 0, out=sums[shift, target])
    return sums


SPAN = 2**20
"""Entries that a CPU goes through at a time: what several passes read again is in its cache then."""


def _spans(
    blocks: Tensor,  # (A, A, D/A)
    *tensors: Tensor,  # (..., D)
) -> Iterator[tuple[Tensor, ...]]:  # (N, A, D/A)
    """Views of the same rows of several tensors: all of them, on a CPU as many at a time as it does well to take."""
    rows = [tensor.reshape(-1, *blocks.shape[1:]) for tensor in tensors]
    whole = max(1, len(rows[0]))
    step = min(whole, max(1, SPAN // blocks[0].numel())) if blocks.device.type == "cpu" else whole
    return zip(*(each.split(step) for each in rows))


def _shifts(width: int) -> Iterator[tuple[int, slice, slice]]:
    """The diagonals of a block beside its main one, each in two runs: which it is, where it reads and where it adds."""
    for shift in range(1, width):
        yield shift, slice(0, width - shift), slice(shift, width)
        yield shift, slice(width - shift, width), slice(0, shift)


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
