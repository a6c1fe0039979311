"""What a fixed route costs: the outputs of the routed model against those of one with the route held.

Shape legend: N routed units, B samples of a batch, S positions (see `tucka.ops`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calibration import bare, device_of, run_batch
from ..model import layers_of
from .factors import LowRank, fixed
from .routes import Observed, quietly, samples_in


class OutputError(NamedTuple):
    """Relative error of a model's outputs (logits, or its first output), over unpadded positions."""

    outputs: float  # ‖fixed − routed‖ / ‖routed‖
    update: float  # ‖fixed − routed‖ / ‖routed − without experts‖: 1 is as far off as having no experts
    samples: int


class Candidate(NamedTuple):
    """A fixed route to be measured, and the units it is to serve."""

    updates: Mapping[str, LowRank]
    serves: Tensor  # (N,) bool


def output_errors(
    model: nn.Module, name: str, candidates: list[Candidate], observed: Observed
) -> list[OutputError | None]:
    """Measure every candidate on the samples it serves; None where it serves none of the loader's."""
    sums = torch.zeros(len(candidates), 3, dtype=torch.float64)  # squares of the error, the output, the update
    samples, start = [0] * len(candidates), 0
    with quietly(model, name):
        for batch, units in zip(observed.batches, observed.units):
            shares = [candidate.serves[start : start + units] for candidate in candidates]
            start += units
            routed = run(model, batch)
            with bare(layers_of(model)):
                plain = run(model, batch)
            for index, served in enumerate(shares):
                if not bool(served.any()):
                    continue
                with fixed(model, candidates[index].updates):
                    held = run(model, batch)
                rows = counted(model, batch, routed, served)
                pairs = ((held, routed), (routed, torch.zeros_like(routed)), (routed, plain))
                sums[index] += torch.stack([_squares(one, other, rows) for one, other in pairs]).cpu()
                samples[index] += int(served.sum()) * samples_in(batch) // units
    return [_error(line, count) for line, count in zip(sums.tolist(), samples)]


def _error(squares: list[float], samples: int) -> OutputError | None:
    error, output, update = map(math.sqrt, squares)
    return OutputError(ratio(error, output), ratio(error, update), samples) if samples else None


def ratio(error: float, size: float) -> float:
    """An error relative to a size; of nothing, 0 if there is none."""
    return error / size if size else (0.0 if not error else math.inf)


def _squares(one: Tensor, other: Tensor, rows: Tensor) -> Tensor:
    """Squared distance over the rows that count; padded positions may hold anything."""
    difference = torch.where(
        rows, one.double() - other.double(), torch.zeros((), dtype=torch.float64, device=one.device)
    )
    return difference.square().sum()


def relative_error(model: nn.Module, batch: Any, found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ over the unpadded positions of a batch."""
    rows = counted(model, batch, expected, torch.ones(1, dtype=torch.bool))
    squares = (_squares(found, expected, rows), _squares(expected, torch.zeros_like(expected), rows))
    return ratio(*(math.sqrt(float(value)) for value in squares))


def run(model: nn.Module, batch: Any) -> Tensor:
    """The tensor to compare of a model's output."""
    return main_output(run_batch(model, batch, device_of(model)))


def main_output(output: Any) -> Tensor:
    """The first floating-point tensor of an output that is no scalar: logits, similarities or hidden states.

    Raises
    ------
    ValueError
        If there is none.
    """
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else [output]
    )
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
            return value
    raise ValueError(f"a {type(output).__name__} holds no floating-point tensor to compare outputs by")


def counted(
    model: nn.Module,
    batch: Any,
    output: Tensor,  # (B, ...)
    served: Tensor,  # (N,) bool, of the batch's units
) -> Tensor:  # broadcasts against the output
    """Which entries of an output count: those of samples that are served, without padded positions.

    Raises
    ------
    ValueError
        If some samples are served and others not, and the output's rows are no samples.
    """
    rows = torch.ones((1,) * output.ndim, dtype=torch.bool, device=output.device)
    if not bool(served.all()):
        if len(served) != output.shape[0]:
            raise ValueError(f"an output of shape {tuple(output.shape)} cannot be tied to {len(served)} samples")
        rows = served.to(output.device).view(-1, *[1] * (output.ndim - 1))
    mask = _mask(model, batch)
    if mask is not None and output.ndim > 2 and mask.shape == output.shape[:2]:
        rows = rows & mask.to(output.device).bool().view(*mask.shape, *[1] * (output.ndim - 2))
    return rows


def _mask(model: nn.Module, batch: Any) -> Tensor | None:
    """The mask of the positions that the outputs are of: the decoder's, if the model has one."""
    config = getattr(model, "config", None)
    key = "decoder_attention_mask" if getattr(config, "is_encoder_decoder", False) else "attention_mask"
    mask = batch.get(key) if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
