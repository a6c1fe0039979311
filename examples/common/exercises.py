"""Exercises for a causal language model: what it trains on, the solutions it writes, and how many are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .answers import solves
from .training import processes

NO_LOSS = -100
"""Label of a token that is not learnt: one of the prompt."""


class Exercise(NamedTuple):
    """A question as the model reads it, a worked solution, the answer that it ends in, and its kind."""

    prompt: str
    solution: str
    answer: str
    kind: str


class Exercises(Dataset):
    """Exercises as token ids; the loss is of the solutions alone.

    Parameters
    ----------
    exercises : sequence of Exercise
        What to learn.
    tokenizer : PreTrainedTokenizerBase
        The model's.
    length : int
        Tokens of a prompt and its solution; what is longer loses its end.
    name : str
        Of the split.
    """

    def __init__(
        self, exercises: Sequence[Exercise], tokenizer: PreTrainedTokenizerBase, length: int, name: str
    ) -> None:
        self.exercises, self.tokenizer, self.length, self.name = exercises, tokenizer, length, name

    def __len__(self) -> int:
        return len(self.exercises)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        exercise = self.exercises[index]
        prompt = self.tokenizer(exercise.prompt)["input_ids"]
        solution = self.tokenizer(exercise.solution, add_special_tokens=False)["input_ids"]
        solution = [*solution, self.tokenizer.eos_token_id]
        ids, labels = [*prompt, *solution], [NO_LOSS] * len(prompt) + solution
        return {
            "input_ids": ids[: self.length],
            "attention_mask": [1] * len(ids[: self.length]),
            "labels": labels[: self.length],
        }


def score(exercises: Sequence[Exercise], texts: Sequence[str]) -> dict[str, float]:
    """Return, by kind, the share in percent of the exercises whose solution ends in the right answer."""
    hits: dict[str, list[bool]] = {}
    for exercise, text in zip(exercises, texts):
        hits.setdefault(exercise.kind, []).append(solves(text, exercise.answer))
    return {kind: 100 * sum(found) / len(found) for kind, found in hits.items()}


@torch.no_grad()
def written(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int,
    new_tokens: int,
    title: str,
) -> list[str]:
    """Let a model write solutions greedily, in batches padded on the left; several processes share the prompts."""
    state, device = processes(), next(model.parameters()).device
    model.eval()
    texts: list[str] = []
    with state.split_between_processes(list(prompts)) as own:
        bar = tqdm(total=len(own), desc=title, unit=" answers", ncols=100, disable=not state.is_main_process)
        for start in range(0, len(own), batch_size):
            batch = tokenizer(own[start : start + batch_size], padding=True, padding_side="left", return_tensors="pt")
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            tokens = model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            texts += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            bar.update(len(tokens))
        bar.close()
    return gather_object(texts)
