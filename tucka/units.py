"""A layer's input seen as routed units, or as rows that belong to samples.

Shape legend: N routed units, B samples, S positions, D features (see `tucka.ops`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Inputs, padding_mask, prompt_mask, rows_per_sample


def as_units(
    x: Tensor,  # (..., D)
    inputs: Inputs,
    layer_name: str,
    *,
    per_sample: bool,
    pool_padding: bool,
    pool_answers: bool,
) -> tuple[Tensor, Tensor | None]:  # (N, S, D), (N, S)
    """View a layer's input as routed units, with a mask of the tokens that count if some are to be left out.

    Left out are padding, tokens that an assistant drafted, and where samples are routed the answers that a causal
    language model is trained on: when it generates, it has the prompt alone to route by. A sample without a prompt
    counts whole.

    Raises
    ------
    ValueError
        If the input's leading size cannot be tied to the samples, where samples or padding ask for it.
    """
    width = x.shape[-1]
    padded = inputs.mask is not None and not pool_padding
    if not per_sample and not padded and inputs.prompt is None:
        return x.reshape(1, -1, width), None
    check_rows(x, inputs, layer_name)
    samples = inputs.samples or 0
    tokens = x.numel() // width // max(samples, 1)
    x = x.reshape(samples, tokens, width)
    # A layer that sees one pooled row per sample has no padding left to leave out.
    pooled = tokens == 1 and inputs.positions != 1
    keep = padding_mask(inputs, samples, tokens) if padded and not pooled else None
    if inputs.prompt is not None and not pooled:
        drafted = torch.arange(tokens, device=x.device) >= inputs.prompt
        keep = (~drafted).expand(samples, -1) if keep is None else keep.to(x.device).bool() & ~drafted
    if per_sample:
        prompt = None if pool_answers or pool_padding or pooled else prompt_mask(inputs, samples, tokens)
        return x, keep if prompt is None else _where_any(prompt, keep)
    return x.reshape(1, -1, width), None if keep is None else keep.reshape(1, -1)


def _where_any(
    prompt: Tensor,  # (B, S) bool
    keep: Tensor | None,  # (B, S)
) -> Tensor:  # (B, S) bool
    """Unpadded tokens of the prompt, or all unpadded tokens of a sample that has no prompt."""
    keep = torch.ones_like(prompt) if keep is None else keep.bool()
    both = keep & prompt.to(keep.device)
    return torch.where(both.any(1, keepdim=True), both, keep)


def check_rows(x: Tensor, inputs: Inputs, layer_name: str) -> None:
    """Raise `ValueError` if a layer's leading size cannot be tied to the samples."""
    samples, positions = inputs.samples, inputs.positions
    if samples is None or rows_per_sample(tuple(x.shape), samples, positions) is None:
        shown = "an unknown number of" if samples is None else samples
        per_sample = "" if positions is None else f" of {positions} positions"
        raise ValueError(
            f"layer {layer_name!r}: leading size {x.shape[0]} of its input {tuple(x.shape)} cannot be tied to "
            f"{shown} samples{per_sample}; exclude the layer (exclude_modules) or use routing='batch'"
        )


def samples_of_rows(
    x: Tensor,  # (..., D)
    inputs: Inputs,
    layer_name: str,
) -> tuple[Tensor, Tensor]:  # (rows,) integer, (rows,) bool
    """The sample every row belongs to, and whether the row counts: padding does not.

    A layer of cross-attention that reads the encoder's output goes by the encoder's mask; one that reads any other
    sequence than the one the mask is for has no padding to be told of.
    """
    check_rows(x, inputs, layer_name)
    if isinstance(inputs.context, Tensor) and inputs.context.data_ptr() == x.data_ptr():
        inputs = inputs._replace(mask=inputs.context_mask)
    samples = inputs.samples or 0
    rows = x.numel() // x.shape[-1]
    tokens = rows // max(samples, 1)
    sample = torch.arange(samples, device=x.device).repeat_interleave(tokens)
    try:
        keep = None if tokens == 1 else padding_mask(inputs, samples, tokens)
    except ValueError:
        keep = None
    if keep is None:
        keep = torch.ones(rows, dtype=torch.bool, device=x.device)
    return sample, keep.reshape(-1).bool().to(x.device)
