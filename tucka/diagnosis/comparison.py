"""Differences of outputs and routes, and how large they may be.

Shape legend: N routed units, K groups, T experts in a group (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..routing import Route, Router
from .report import Row, judged

TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far two ways of computing the same thing may lie apart, by the lowest precision of the model."""

AMPLIFIED = 4
"""How much more than the base model an adapted one may amplify what the base model does by itself."""

MAIN_OUTPUTS = ("logits", "logits_per_text", "last_hidden_state")


def tolerance_of(model: nn.Module) -> float:
    """The tolerance for a model: that of the lowest precision its parameters have."""
    found = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max(TOLERANCES.get(dtype, max(TOLERANCES.values())) for dtype in found)


def main_output(output: Any) -> Tensor:
    """The tensor of an output that is compared: logits or hidden states, else the first of floating point.

    Raises
    ------
    ValueError
        If the output holds no tensor of floating point.
    """
    if isinstance(output, Mapping):
        named = [output[name] for name in MAIN_OUTPUTS if isinstance(output.get(name), Tensor)]
        output = named or list(output.values())
    for value in output if isinstance(output, (tuple, list)) else [output]:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
            return value
    raise ValueError("the model's output holds no tensor of floating point that could be compared")


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry of what is expected; infinite where exactly one is finite.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if found.shape != expected.shape:
        raise ValueError(f"outputs of shapes {tuple(found.shape)} and {tuple(expected.shape)} cannot be compared")
    found, expected = found.detach().double(), expected.detach().double()
    both = found.isfinite() & expected.isfinite()
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return float("inf")
    if not both.any():
        return 0.0
    difference = (found[both] - expected[both]).abs().max()
    scale = expected[both].abs().max()
    return float(difference / scale) if scale > 0 else float(difference)


def route_difference(found: Route, expected: Route, router: Router) -> float:
    """How far two routes of the same units lie apart, as a difference of scores.

    That is the largest difference of a score; where the groups differ, at least the margin by which the expected one
    was chosen, so that a tie that rounding decides is none.

    Raises
    ------
    ValueError
        If the routes are of different numbers of units.
    """
    if found.group.shape != expected.group.shape:
        raise ValueError(f"routes of {len(found.group)} and {len(expected.group)} units cannot be compared")
    scores, other = expected.scores, found.scores
    if scores is None or other is None:  # a route made by hand
        return float((found.group != expected.group).any())
    scores, other = scores.detach().double(), other.detach().double()
    best_NK = (scores if router.balance_bias is None else scores + router.balance_bias).amax(-1)
    margin_N = best_NK.gather(1, expected.group.view(-1, 1)) - best_NK.gather(1, found.group.view(-1, 1))
    return largest([*(other - scores).abs().flatten().tolist(), *margin_N.flatten().tolist()])


def beside_base(route: float, ours: float, base: float, tolerance: float, why: str, remedy: str) -> Row:
    """Judge how far routes and outputs moved, given how far those of the base model alone did."""
    excused = tolerance < ours <= AMPLIFIED * base
    note = f"the base model's own outputs change by {base:.2g}; routes alone compared" if excused else ""
    return judged(route if excused else largest([route, ours]), tolerance, why, remedy, note)


def largest(values: Iterable[float]) -> float:
    """The largest value, 0 of none; NaN where there is one, which Python's `max` may pass over."""
    values = list(values)
    return float("nan") if any(value != value for value in values) else max(values, default=0.0)


def rows_of(route: Route, start: int, stop: int) -> Route:
    """The route of some units."""
    return route.map(lambda field: field[start:stop])
