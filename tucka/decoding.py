"""The update while `generate` runs: its route lasts, so every layer multiplies out beforehand what no token changes.

Shape legend: N routed units, S rows of a unit, D and O input and output features, R rank, A width of
blocks on the axes (see `tucka.ops`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import ops
from .passes import add_product
from .routing import Route

if TYPE_CHECKING:
    from .scope import Current


class Ready(NamedTuple):
    """A layer's update at a route that lasts: x U (M) Vᵀ, with M in the last factor where all rows have one."""

    adapter_names: list[str]
    route: Route
    form: str
    input_mode: Tensor  # (D, R)
    mix: Tensor | None  # (N, R, R); None: one for all rows
    output_mode: Tensor  # (R, O)
    axes: Tensor | None  # (A, A, D/A), see `ops.axes_by_source`
    overwrite: bool  # whether what it adds to may be written to

    def serves(self, adapter_names: list[str], x: Tensor, current: Current) -> bool:
        """Whether this is what the layer would compute: the adapter, route, precision and samples are the same."""
        scope = current.scope
        return (
            scope is not None
            and self.adapter_names == adapter_names
            and scope.routes.get(adapter_names[0]) is self.route
            and not scope.shared_input
            and x.dtype == self.input_mode.dtype
            and (self.mix is None or self.mix.shape[0] == x.shape[0])
            and not torch.is_grad_enabled()
        )

    def adapt(
        self,
        x: Tensor,  # (..., D)
    ) -> Tensor:  # (..., D)
        """X with the slice on its axes, in few operations on few rows."""
        if self.axes is None:
            return x
        return (x.unflatten(-1, (len(self.axes), 1, -1)) * self.axes).sum(-3).flatten(-2)

    def add(
        self,
        onto: Tensor,  # (..., O)
        x: Tensor,  # (..., D)
    ) -> Tensor:  # (..., O)
        """Onto + x U M Vᵀ, in place where it may be."""
        rows = x.reshape(-1, x.shape[-1]) @ self.input_mode
        if self.mix is not None:
            rows = torch.bmm(ops.by_unit(rows, len(self.mix)), self.mix).flatten(0, 1)
        return add_product(onto, rows.to(onto.dtype), self.output_mode.to(onto.dtype), self.overwrite)


def make_ready(
    current: Current,
    adapter_names: list[str],
    form: str,
    input_mode: Tensor,  # (D, R), in the precision of the product
    mix: Tensor,  # (N, R, R)
    output_mode: Tensor,  # (O, R)
    axis_blocks: Tensor | None,  # (A, A, D/A)
    overwrite: bool,
) -> Ready | None:
    """A layer's update for the tokens to come of a `generate`, if the route that it was made with will last."""
    scope = current.scope
    if scope is None or scope.warm is not None or scope.shared_input:
        return None
    route = scope.routes.get(adapter_names[0])
    if route is None or torch.is_grad_enabled() or torch.is_autocast_enabled(mix.device.type):
        return None
    dtype, output_RO = input_mode.dtype, output_mode.mT.to(mix.device)
    axes = None if axis_blocks is None else ops.axes_by_source(axis_blocks)
    input_mode = input_mode.mT.contiguous().mT  # a few rows are multiplied fastest with columns that lie together
    if len(mix) == 1:
        mixed_RO = (mix[0] @ output_RO).to(dtype)
        return Ready(adapter_names, route, form, input_mode, None, mixed_RO, axes, overwrite)
    output_RO = output_RO.to(dtype).contiguous()
    return Ready(adapter_names, route, form, input_mode, mix.to(dtype), output_RO, axes, overwrite)
