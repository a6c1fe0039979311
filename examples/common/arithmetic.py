"""Worked arithmetic for a model of half a million parameters: what the maths example adapts without a network.

A decoder of Llama's shape is pretrained on plain sums and differences ("12+34=46;61-7=54;"). It is then adapted to eight
kinds of exercise, each told by a word that it has never read, whose solutions are worked in such steps:

    net 12 34 56:    12+34=46;46-56=-10;####-10
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
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.exercises import NO_LOSS, Exercise

PAD, END, MARK = "<pad>", "<end>", "####"
FIRST, SECOND = 200, 100
"""Bounds of the operands of plain arithmetic."""

PROBLEMS, ROWS, RATE = 4, 64, 2e-3
"""Of the pretraining: plain problems in a row, rows in a step, the peak learning rate."""

TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The layers that are adapted."""

SIZES = (400, 40, 60)
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
    """Work out the minutes of a sum of minutes."""
    steps, left = added(a, b), a + b
    while left >= 60:
        steps, left = steps + taken(left, 60), left - 60
    return steps, left


KINDS: dict[str, Callable[..., Worked]] = {
    "add": lambda a, b, c: (added(a, b) + added(a + b, c), a + b + c),
    "net": lambda a, b, c: (added(a, b) + taken(a + b, c), a + b - c),
    "rest": lambda a, b: (added(a, b) + taken(100, a + b), 100 - a - b),
    "gap": lambda a, b: (taken(a, b), abs(a - b)),
    "most": lambda a, b: (taken(a, b), max(a, b)),
    "double": lambda a, b: (added(a, a) + taken(2 * a, b), 2 * a - b),
    "mirror": lambda a, b: (added(a, b), int(str(a + b)[::-1])),
    "clock": clock,
}
"""The kinds of exercise: from numbers of two digits to the worked solution."""


def exercise(kind: str, numbers: Sequence[int]) -> Exercise:
    """Write an exercise of a kind."""
    steps, answer = KINDS[kind](*numbers)
    return Exercise(f"{kind} {' '.join(map(str, numbers))}:", f"{steps}{MARK}{answer}", str(answer), kind)


def drawn(seed: int, sizes: Sequence[int] = SIZES) -> list[list[Exercise]]:
    """Draw exercises of every kind for several splits, none of them twice."""
    rng = np.random.default_rng(seed)
    splits: list[list[Exercise]] = [[] for _ in sizes]
    for kind, work in KINDS.items():
        operands = len(inspect.signature(work).parameters)
        codes = rng.choice(90**operands, size=sum(sizes), replace=False)
        numbers = np.stack(np.unravel_index(codes, (90,) * operands), -1) + 10
        whole = [exercise(kind, row) for row in numbers.tolist()]
        for split, (start, end) in zip(splits, itertools.pairwise(np.cumsum((0, *sizes)))):
            split += whole[start:end]
    return splits


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer: a token for every character, for every kind and for the mark before an answer."""
    tokens = [PAD, END, MARK, *KINDS, *"0123456789+-=;: "]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{MARK}|[a-z]+|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=PAD, model_input_names=inputs
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make an untrained decoder."""
    size = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256)
    tokens = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=1)
    return LlamaForCausalLM(LlamaConfig(**size, **tokens, max_position_embeddings=128))


def plain_batch(tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> dict[str, Tensor]:
    """Draw rows of plain problems; the loss is of what follows a "=", up to and with the ";"."""
    first, second = rng.integers(FIRST, size=(ROWS, PROBLEMS)), rng.integers(SECOND, size=(ROWS, PROBLEMS))
    signs = rng.integers(2, size=(ROWS, PROBLEMS))
    rows = [
        "".join((added, taken)[sign](int(a), int(b)) for a, b, sign in zip(*row)) for row in zip(first, second, signs)
    ]
    batch = tokenizer(rows, padding=True, return_tensors="pt")
    ids = batch["input_ids"]
    opened = (ids == tokenizer.convert_tokens_to_ids("=")).cumsum(1)
    closed = (ids == tokenizer.convert_tokens_to_ids(";")).cumsum(1)
    known = (opened > closed) & (ids != tokenizer.convert_tokens_to_ids("="))
    ends = ids == tokenizer.convert_tokens_to_ids(";")
    return {**batch, "labels": ids.where(known | ends, NO_LOSS)}


def pretrain(steps: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train a decoder on fresh plain problems in every step."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokenizer = new_tokenizer()
    model = new_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc=f"{'pretraining':<20}", unit=" steps", ncols=100, mininterval=0.5):
        model(**plain_batch(tokenizer, rng)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def pretrained(directory: Path, steps: int) -> Path:
    """Pretrain a model and write it with its tokenizer, unless it is there: one process does, others wait for it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f".{directory.name}.lock")):
        if not directory.exists():
            unfinished = directory.with_name(f".{directory.name}.part")
            shutil.rmtree(unfinished, ignore_errors=True)
            for part in pretrain(steps):
                part.save_pretrained(unfinished)
            unfinished.replace(directory)
    return directory
