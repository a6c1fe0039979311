"""What a forward of the base model says about its batch: samples, positions, padding, cache.

Shape legend: B samples, S positions of a sample, D features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel

TOKEN_INPUTS = ("input_ids", "decoder_input_ids")
"""Inputs of shape (B, S)."""

EMBEDDED_INPUTS = ("inputs_embeds", "decoder_inputs_embeds")
"""Inputs of shape (B, S, D)."""

NO_LABEL = -100
"""What marks a token that no loss is taken of, in transformers."""


class Inputs(NamedTuple):
    """One call of a model, as far as routing needs it."""

    samples: Optional[int] = None
    positions: Optional[int] = None  # None where an input does not show it (images, audio)
    mask: Any = None  # as given: (B, S), or an attention mask of more dimensions
    cache: Optional[Cache] = None
    encoder_outputs: Any = None
    context: Optional[Tensor] = None  # what cross-attention reads
    context_mask: Any = None
    labels: Optional[Tensor] = None  # (B, S) of a causal language model
    output_lengths: Optional[Callable] = None  # of a model that shortens its input: lengths in, lengths of tokens out
    prompt: Optional[int] = None  # leading positions that are the prompt, where drafted tokens follow it


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's positional arguments, so that a call can be read without binding a signature each time."""
    return tuple(inspect.signature(module.forward).parameters)


def read_inputs(
    module: nn.Module, names: tuple[str, ...], main_input: str, args: tuple, kwargs: dict[str, Any]
) -> Inputs:
    """Read samples, positions, padding mask, cache and encoder outputs off the arguments of a forward."""
    arguments = {**dict(zip(names, args)), **kwargs}
    samples, positions = _batch_shape(arguments, main_input)
    cache = arguments.get("past_key_values")
    return Inputs(
        samples,
        positions,
        arguments.get("attention_mask"),
        cache if isinstance(cache, Cache) else None,
        arguments.get("encoder_outputs"),
        arguments.get("encoder_hidden_states"),
        arguments.get("encoder_attention_mask"),
        arguments.get("labels") if is_causal(module) else None,
        getattr(module, "_get_feat_extract_output_lengths", None),  # transformers' name in its speech models
    )


def is_causal(module: nn.Module) -> bool:
    """Whether a model generates from a prompt that it reads itself; labels of other models say nothing of prompts."""
    config: Any = module.config if isinstance(module, PreTrainedModel) else None
    return isinstance(module, GenerationMixin) and config is not None and not config.is_encoder_decoder


def _batch_shape(arguments: dict[str, Any], main_input: str) -> tuple[int | None, int | None]:
    """(B, S) where the inputs show them. The model's main input counts before any other."""
    for name in (main_input, *TOKEN_INPUTS, *EMBEDDED_INPUTS):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.ndim > 0:
            shows_positions = name in TOKEN_INPUTS + EMBEDDED_INPUTS and value.ndim > 1
            return value.shape[0], value.shape[1] if shows_positions else None
    first = _first_tensor(arguments.values())
    return (None, None) if first is None else (first.shape[0], None)


def _first_tensor(values: Iterable[Any]) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
        if isinstance(value, Mapping):
            value = value.values()
        elif not isinstance(value, (list, tuple)):
            continue
        nested = _first_tensor(value)
        if nested is not None:
            return nested
    return None


def rows_per_sample(shape: tuple[int, ...], samples: int, positions: int | None) -> int | None:
    """Leading rows that belong to one sample in a layer's input of that shape, or None if they cannot be tied.

    Tied are: one row (or sequence, or map) per sample; all tokens of all samples flattened, (B·S, D); and, where the
    inputs do not show S, windows or patches moved into the leading dimension, sample by sample, as vision models do.
    """
    leading = shape[0]
    if leading == samples:
        return 1
    if positions is None:
        return leading // samples if samples and leading % samples == 0 else None
    return positions if len(shape) == 2 and leading == samples * positions else None


def padding_mask(inputs: Inputs, samples: int, tokens: int) -> Tensor | None:
    """Tokens that are not padding, (B, S), from the attention mask a model was given.

    A mask with a query dimension says it by its columns: a token is padding if no query attends to it. With a cache a
    mask also covers the cached positions; in a speech model it covers the samples of the waveform.

    Raises
    ------
    ValueError
        If the mask's kind or size does not show which of the tokens are padding.
    """
    mask, cache = inputs.mask, inputs.cache
    if isinstance(mask, Mapping):  # one mask per kind of attention; every kind lets a token attend to itself
        mask = next(iter(mask.values()), None)
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(f"padding cannot be read from an attention mask of type {type(mask).__name__}")
    columns = mask.shape[-1]
    if mask.ndim > 2:
        attended = mask >= 0 if mask.is_floating_point() else mask.bool()
        mask = attended.flatten(1, -2).any(1)
        mask = mask.expand(samples, -1)
    else:
        mask = mask.bool()
    if columns == tokens:
        return mask
    if inputs.output_lengths is not None:
        lengths = inputs.output_lengths(mask.sum(-1))
        return torch.arange(tokens, device=mask.device) < lengths.unsqueeze(-1)
    if cache is None or columns < tokens:
        raise ValueError(f"the attention mask covers {columns} positions, the router's layer sees {tokens}")
    # A cache of fixed size masks its unused tail; one that grows ends with the tokens at hand.
    return mask[:, :tokens] if cache.is_compileable else mask[:, -tokens:]


def prompt_mask(inputs: Inputs, samples: int, tokens: int) -> Tensor | None:
    """Tokens without a label, (B, S): the prompts in a batch that a causal language model is trained on, or None."""
    labels = inputs.labels
    if not isinstance(labels, Tensor) or labels.shape != (samples, tokens):
        return None
    return labels == NO_LABEL
