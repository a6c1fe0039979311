"""A small causal language model of characters that can add and subtract, adapted to six other kinds of problem."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.fitting import fit

from .cache import cached
from .task import Options, Rows, Splits, Task

PAD = "."
CHARACTERS = PAD + "0123456789=+-%><~|&"
ANSWER = 3
"""Every answer has so many characters: digits with leading zeros, or a minus and two digits."""

LEARNT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b}
"""What the model is pretrained on, by the sign in the prompt, as in "12+34=046"."""

KINDS: dict[str, Callable[..., int]] = {
    "%": lambda a, b: (a + b) % 50,
    ">": lambda a, b: max(a, b),
    "<": lambda a, b: min(a, b),
    "~": lambda a, b: int(f"{a + b:03d}"[::-1]),
    "|": lambda a, b: abs(a - b),
    "&": lambda a, b, c: a + b + c,
}
"""What it is adapted to; no sign occurs in the pretraining."""

SIZES = Splits(1000, 200, 400)
"""Problems of each kind."""


def problem(sign: str, answer: Callable[..., int], numbers: Sequence[int]) -> str:
    """Prompt and answer, as "12&34&56=102"."""
    return f"{sign.join(f'{number:02d}' for number in numbers)}={answer(*numbers):03d}"


def encoded(problems: Sequence[str]) -> Rows:
    """Problems as token ids, padded on the left so that all answers stand at the end; the loss is on answers alone."""
    width = max(map(len, problems))
    ids = torch.tensor([[CHARACTERS.index(c) for c in text.rjust(width, PAD)] for text in problems])
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    return Rows({"input_ids": ids, "attention_mask": (ids != CHARACTERS.index(PAD)).long(), "labels": labels})


def new_llama() -> LlamaForCausalLM:
    """An untrained decoder of 660,000 parameters."""
    sizes = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256)
    special = dict(pad_token_id=CHARACTERS.index(PAD), bos_token_id=None, eos_token_id=None)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(CHARACTERS), max_position_embeddings=32, tie_word_embeddings=False, **sizes, **special
        )
    )


def pretrained(numbers: int) -> dict[str, Tensor]:
    """Weights of a model trained on nine tenths of all additions and subtractions of numbers below a bound."""
    problems = [problem(s, f, (a, b)) for s, f in LEARNT.items() for a in range(numbers) for b in range(numbers)]
    order = np.random.default_rng(0).permutation(len(problems))
    rows = encoded([problems[i] for i in order[: len(order) * 9 // 10]])
    torch.manual_seed(0)
    model = new_llama()
    fit(model, rows, epochs=12, batch_size=64, learning_rate=1e-3, seed=0)
    return model.state_dict()


def answer_hits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Whether greedy decoding from each prompt gives exactly its answer.

    For a causal model one forward over prompt and answer would tell the same: up to the first wrong character greedy
    decoding has read what that forward reads. It would not for adapters that pool over the sequence, whose route would
    then have seen the answer, so the answers are really decoded.
    """
    prompt = {name: batch[name][:, :-ANSWER] for name in ("input_ids", "attention_mask")}
    decoded = model.generate(**prompt, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False)
    return (decoded[:, -ANSWER:] == batch["labels"][:, -ANSWER:]).all(-1)


def draw(sign: str, count: int, rng: np.random.Generator) -> list[str]:
    """Distinct problems of a kind."""
    operands = 3 if sign == "&" else 2
    codes = rng.choice(100**operands, size=count, replace=False)
    numbers = np.stack([codes // 100**place % 100 for place in range(operands)], -1)
    return [problem(sign, KINDS[sign], row.tolist()) for row in numbers]


def build(seed: int, options: Options) -> Task:
    """Make the task; all seeds adapt the same model."""
    numbers = 10 if options.samples else 100
    weights = cached(options.work / f"arithmetic-{numbers}.pt", lambda: pretrained(numbers))
    sizes = Splits(*(min(size, options.samples or size) for size in SIZES))
    rng = np.random.default_rng(seed)
    drawn = [draw(sign, sum(sizes), rng) for sign in KINDS]
    bounds = np.cumsum((0, *sizes))
    rows = [encoded([text for kind in drawn for text in kind[a:b]]) for a, b in itertools.pairwise(bounds)]

    def base() -> LlamaForCausalLM:
        model = new_llama().eval()
        model.load_state_dict(weights)
        return model

    return Task(
        name="arithmetic",
        base=base,
        rows=Splits(*rows),
        domains=Splits(*(np.repeat(np.arange(len(KINDS)), size) for size in sizes)),
        target_modules=("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        modules_to_save=(),
        hits=answer_hits,
        epochs=6,
        batch_size=64,
        chance=0.0,
    )
