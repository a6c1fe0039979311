"""Worked arithmetic for a model of 127,000 parameters: what the maths example adapts without a network.

A decoder of Llama's shape is pretrained on plain sums and differences of two numbers:

    plus 12 4:      12+4=16;####16

It is then adapted to eight kinds of exercise, each told by a word that it has never read, whose solutions take several
such steps, or end in something else than the last result:

    net 12 4 28:    12+4=16;16-28=-12;####-12
"""

from __future__ import annotations

import inspect
import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .exercises import Exercise, Exercises

PAD, END, MARK = "<pad>", "<end>", "####"
FIRST, SECOND = 60, 29
"""The largest operands of plain arithmetic; exercises are of numbers from 1 to the second."""

PRETRAIN_STEPS, ROWS, RATE = 1200, 64, 3e-3
"""Of the pretraining: its steps, exercises in a step, the peak learning rate."""

TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The layers that are adapted."""

LENGTH = 64
"""Tokens of an exercise with its solution, at most."""

SIZES = (150, 30, 60)
"""Training, validation and test exercises of each kind."""

Worked = tuple[str, int]
"""The steps of a solution, and its answer."""


def added(a: int, b: int) -> str:
    """Write a sum."""
    return f"{a}+{b}={a + b};"


def taken(a: int, b: int) -> str:
    """Write a difference."""
    return f"{a}-{b}={a - b};"


def clock(a: int, b: int) -> Worked:
    """Work out the hour, some hours after an hour."""
    steps, hour = added(a, b), a + b
    while hour >= 24:
        steps, hour = steps + taken(hour, 24), hour - 24
    return steps, hour


PLAIN: dict[str, Callable[..., Worked]] = {
    "plus": lambda a, b: (added(a, b), a + b),
    "minus": lambda a, b: (taken(a, b), a - b),
}
"""The kinds of exercise that the model is pretrained on."""

KINDS: dict[str, Callable[..., Worked]] = {
    "add": lambda a, b, c: (added(a, b) + added(a + b, c), a + b + c),
    "net": lambda a, b, c: (added(a, b) + taken(a + b, c), a + b - c),
    "rest": lambda a, b: (taken(60, a) + taken(60 - a, b), 60 - a - b),
    "gap": lambda a, b: (taken(a, b), abs(a - b)),
    "most": lambda a, b: (taken(a, b), max(a, b)),
    "double": lambda a, b: (added(a, a) + taken(2 * a, b), 2 * a - b),
    "mirror": lambda a, b: (added(a, b), int(str(a + b)[::-1])),
    "clock": clock,
}
"""The kinds of exercise: from numbers to the worked solution."""


def exercise(kind: str, numbers: Sequence[int]) -> Exercise:
    """Write an exercise of a kind."""
    steps, answer = {**PLAIN, **KINDS}[kind](*numbers)
    return Exercise(f"{kind} {' '.join(map(str, numbers))}:", f"{steps}{MARK}{answer}", str(answer), kind)


def drawn(seed: int, sizes: Sequence[int] = SIZES) -> list[list[Exercise]]:
    """Draw exercises of every kind for several splits, none of them twice."""
    rng = np.random.default_rng(seed)
    splits: list[list[Exercise]] = [[] for _ in sizes]
    for kind, work in KINDS.items():
        operands = len(inspect.signature(work).parameters)
        codes = rng.choice(SECOND**operands, size=sum(sizes), replace=False)
        numbers = np.stack(np.unravel_index(codes, (SECOND,) * operands), -1) + 1
        whole = [exercise(kind, row) for row in numbers.tolist()]
        for split, (start, end) in zip(splits, itertools.pairwise(np.cumsum((0, *sizes)))):
            split += whole[start:end]
    return splits


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer: a token for every character, for every kind and for the mark before an answer."""
    tokens = [PAD, END, MARK, *PLAIN, *KINDS, *"0123456789+-=;: "]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{MARK}|[a-z]+|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=PAD, model_input_names=inputs
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make an untrained decoder."""
    size = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
    tokens = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=1)
    return LlamaForCausalLM(LlamaConfig(**size, **tokens, max_position_embeddings=128))


def plain_exercises(count: int, rng: np.random.Generator) -> list[Exercise]:
    """Draw plain sums and differences."""
    numbers = zip(*(rng.integers(bound + 1, size=count).tolist() for bound in (FIRST, SECOND)))
    return [exercise(kind, pair) for kind, pair in zip(rng.choice(list(PLAIN), count).tolist(), numbers)]


def pretrain(steps: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train a decoder on fresh plain exercises in every step."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokenizer = new_tokenizer()
    model, collate = new_model(tokenizer).train(), DataCollatorForSeq2Seq(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc=f"{'pretraining':<20}", unit=" steps", ncols=100, mininterval=0.5):
        rows = Exercises(plain_exercises(ROWS, rng), tokenizer, LENGTH, "plain")
        model(**collate([rows[index] for index in range(ROWS)])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def pretrained(directory: Path, steps: int = PRETRAIN_STEPS) -> Path:
    """A directory with a model that knows plain arithmetic, and its tokenizer; made once.

    Parameters
    ----------
    directory : Path
        Where to keep it.
    steps : int
        Length of the pretraining.
    """
    path = directory / f"arithmetic-llama-{steps}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / f".{path.name}.lock"):
        if not path.exists():
            unfinished = path.with_suffix(".part")
            shutil.rmtree(unfinished, ignore_errors=True)
            for part in pretrain(steps):
                part.save_pretrained(unfinished)
            unfinished.rename(path)
    return path
