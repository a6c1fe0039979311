"""Check of generation: with and without a cache, the same tokens by the same route.

Shape legend: B samples of a batch, S positions (see `tucka.ops`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from ..calibration import bare, device_of
from ..routing import Route
from .comparison import beside_base, largest, relative, route_difference, tolerance_of
from .report import Row, skipped
from .subject import Subject

STEPS, MOST_SAMPLES, LONGEST_PROMPT = 8, 4, 64

NOT_FOR_GENERATION = ("labels", "position_ids", "token_type_ids", "return_loss", "use_cache", "return_dict")


def cached_generation(subject: Subject) -> Row:
    """Greedy generation gives the same logits and routes with and without a cache."""
    base = subject.base
    if not isinstance(base, GenerationMixin):
        return skipped(f"{type(base).__name__} does not generate")
    if not isinstance(subject.batch, Mapping):
        return skipped("only batches that are mappings can be generated from")
    prompts = _prompts(subject)
    cached, routes = _generate(subject, prompts, use_cache=True)
    if cached.past_key_values is None:
        return skipped(f"{type(base).__name__} has no cache")
    uncached, others = _generate(subject, prompts, use_cache=False)
    tokens, route = _token_difference(cached, uncached), _route_differences(subject, routes, others)
    with bare(subject.layers):
        alone = _token_difference(*(_generate(subject, prompts, use_cache=on)[0] for on in (True, False)))
    return beside_base(
        route,
        tokens,
        alone,
        tolerance_of(subject.model),
        f"In {STEPS} steps, cached and uncached, routes differ from the prompt's by {route:.2g}, logits from each "
        f"other by {tokens:.2g} (the base model alone: {alone:.2g}).",
        "The route of the prompt is not kept while decoding: generate with the model's own generate(), or pin the "
        "route (with tucka.pin_route(model, route): …) in a decoding loop of your own.",
    )


def _generate(subject: Subject, prompts: dict[str, Any], use_cache: bool) -> tuple[Any, dict[str, list[Route]]]:
    base: Any = subject.base
    own = base.generation_config
    config = GenerationConfig(
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        num_beams=1,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=0 if own.pad_token_id is None else own.pad_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
    )
    with torch.no_grad(), subject.recorded() as routes:
        return base.generate(**prompts, generation_config=config), routes


def _prompts(subject: Subject) -> dict[str, Any]:
    """A few short prompts out of the batch; those of a decoder end where generation begins, so padded on the left."""
    device = device_of(subject.model)
    batch = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in subject.part(0, MOST_SAMPLES).items()
        if key not in NOT_FOR_GENERATION and not key.startswith(("decoder_", "output_"))
    }
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.shape == ids.shape and not subject.has_decoder:
        order = mask.long().argsort(dim=1, stable=True)  # padding, which is 0, comes first
        batch.update(input_ids=ids.gather(1, order), attention_mask=mask.gather(1, order))
    if set(batch) <= {"input_ids", "attention_mask"}:  # beside images, ids hold a place for every patch
        kept = slice(LONGEST_PROMPT) if subject.has_decoder else slice(-LONGEST_PROMPT, None)
        batch = {key: value[:, kept] for key, value in batch.items()}
    return batch


def _token_difference(found: Any, expected: Any) -> float:
    """Largest relative difference of logits, in every sample up to where its tokens part."""
    tokens = [output.sequences[:, -len(output.logits) :] for output in (found, expected)]
    same_B = torch.ones_like(tokens[0][:, 0], dtype=torch.bool)
    differences = []
    for step, (logits, others) in enumerate(zip(found.logits, expected.logits)):
        differences.append(relative(logits[same_B], others[same_B]))
        same_B = same_B & (tokens[0][:, step] == tokens[1][:, step])
    return largest(differences)


def _route_differences(subject: Subject, *runs: dict[str, list[Route]]) -> float:
    """How far any route of any step lies from the first one of its tower."""
    differences = []
    for tower, taken in runs[0].items():
        router = subject.dispatchers[tower].router(subject.adapter_name)
        differences += [route_difference(route, taken[0], router) for run in runs for route in run[tower]]
    return largest(differences)
