"""Checks of padding: said to the model, and without effect.

Shape legend: B samples of a batch, S positions (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..calibration import bare
from ..inputs import NO_LABEL, parameter_names
from .comparison import beside_base, largest, main_output, relative, route_difference, tolerance_of
from .report import FAIL, PASS, Row, skipped
from .subject import Subject


def padding_is_masked(subject: Subject) -> Row:
    """Pad tokens at the ends of samples are marked as padding by an attention mask."""
    batch, token = subject.batch, pad_token(subject)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return skipped("the batch has no input_ids")
    if "attention_mask" not in parameter_names(subject.base):
        return skipped("the model takes no attention_mask")
    if token is None:
        return skipped("the model's configuration names no pad token")
    mask = batch.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        return skipped("an attention mask with a query dimension is not looked at")
    runs_B = _padded_run(ids == token, mask)
    # A sample may well end in one end token that pads others.
    least = 2 if token == _text_config(subject).get("eos_token_id") else 1
    found = int((runs_B >= least).sum())
    if not found:
        return Row(PASS)
    return Row(
        FAIL,
        f"{found} of {len(ids)} samples begin or end with the pad token ({token}), but "
        + ("no attention_mask is given" if mask is None else "the attention_mask calls it text")
        + ": padding then enters routes and attention.",
        "Pass the attention_mask of the tokenizer: tokenizer(texts, padding=True, return_tensors='pt').",
    )


def _padded_run(pads: Tensor, mask: Tensor | None) -> Tensor:  # (B, S) bool, (B, S) → (B,)
    """Length of the longer run of unmasked pad tokens at either end of every sample."""
    if mask is not None:
        pads = pads & mask.bool()
    runs = [pads.flip(1) if flipped else pads for flipped in (False, True)]
    return torch.stack([run.long().cumprod(1).sum(1) for run in runs]).amax(0)


def padding_invariance(subject: Subject) -> Row:
    """More padding changes no route, and no output at a token."""
    config = subject.config
    if config.pool_padding:
        return skipped(
            "By design padding enters the routes here (pool_padding=True, as in the published code).",
            "If predictions must not depend on how far a batch is padded, use pool_padding=False.",
        )
    pair = _padded_pair(subject)
    if pair is None:
        return skipped("only batches of input_ids with an attention_mask (B, S) can be padded further")
    ours, route = _changes(subject, pair)
    with bare(subject.layers):
        base, _ = _changes(subject, pair)
    return beside_base(
        route,
        ours,
        base,
        tolerance_of(subject.model),
        f"{pair.columns} more columns of padding on the {pair.side} change the routes by {route:.2g} and the outputs "
        f"at tokens by {ours:.2g} (the base model alone: {base:.2g}).",
        "Padding reaches the routing feature or the experts: see that the attention mask reaches the model, that it is "
        "1 for tokens and 0 for padding, and let the router read a layer before tokens are merged or moved "
        "(router_module).",
    )


class _Pair(NamedTuple):
    """A batch, and the same with more padding."""

    shorter: dict[str, Any]
    longer: dict[str, Any]
    columns: int
    side: str
    masks: Optional[tuple[Tensor, Tensor]]  # where outputs lie beside tokens


def _changes(subject: Subject, pair: _Pair) -> tuple[float, float]:
    """Relative change of the outputs at tokens, and change of the routes."""
    shorter, routes = subject.routed(pair.shorter)
    longer, others = subject.routed(pair.longer)
    outputs = [main_output(shorter), main_output(longer)]
    if pair.masks is not None:
        outputs = [_at_tokens(output, mask) for output, mask in zip(outputs, pair.masks)]
    moved = [
        route_difference(other, route, subject.dispatchers[tower].router(subject.adapter_name))
        for tower, taken in routes.items()
        for route, other in zip(taken, others[tower])
    ]
    return relative(outputs[1], outputs[0]), largest(moved)


def _at_tokens(output: Tensor, mask: Tensor) -> Tensor:
    return output[mask.bool().to(output.device)] if output.shape[:2] == mask.shape else output


def _padded_pair(subject: Subject) -> _Pair | None:
    """The batch without and with a quarter more padding, on the side where it has some already."""
    batch = dict(subject.batch) if isinstance(subject.batch, Mapping) else {}
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or ids.ndim != 2 or mask.shape != ids.shape:
        return None
    left, columns = not bool(mask[:, 0].all()), max(4, ids.shape[1] // 4)
    if left and "position_ids" in parameter_names(subject.base):
        # As generate() does; without it absolute positions would shift.
        batch["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
    own = [key for key in batch if not (subject.has_decoder and _is_decoders(key))]
    alongside = {key: batch[key] for key in own if isinstance(batch[key], Tensor) and batch[key].shape[:2] == ids.shape}
    room = (_text_config(subject).get("max_position_embeddings") or 10**9) - ids.shape[1]
    if room < columns:  # cut as many tokens as padding will take the place of
        if ids.shape[1] <= columns:
            return None
        kept = slice(columns, None) if left else slice(None, -columns)
        batch.update({key: value[:, kept] for key, value in alongside.items()})
    fills = {"input_ids": pad_token(subject) or 0, "labels": NO_LABEL}
    longer = {key: _padded(batch[key], columns, left, fills.get(key, 0)) for key in alongside}
    masks = None if subject.has_decoder else (batch["attention_mask"], longer["attention_mask"])
    return _Pair(batch, {**batch, **longer}, columns, "left" if left else "right", masks)


def _padded(value: Tensor, columns: int, left: bool, fill: int) -> Tensor:
    """A tensor (B, S, …) with more positions."""
    behind = [0, 0] * (value.ndim - 2)
    return pad(value, [*behind, columns, 0] if left else [*behind, 0, columns], value=fill)


def _is_decoders(key: str) -> bool:
    return key == "labels" or key.startswith("decoder_")


def pad_token(subject: Subject) -> int | None:
    """The id of the pad token, if the model's configuration names one."""
    return _text_config(subject).get("pad_token_id")


def _text_config(subject: Subject) -> dict[str, Any]:
    if not isinstance(subject.base, PreTrainedModel):
        return {}
    config = subject.base.config.get_text_config()
    names = ("pad_token_id", "eos_token_id", "max_position_embeddings")
    return {name: getattr(config, name, None) for name in names}
