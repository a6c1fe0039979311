"""Five tasks on text from the Python installation, trained together with one head of eight labels for all.

As answer tokens are in multi-task fine-tuning, the labels are shared: label 3 is a module for a docstring and a
category for the name of a character. In `pytext` only the text tells the task, and some texts of two tasks look alike;
in `pytext-asked` each text begins with the name of its task, as the samples of instruction tuning begin with what is
asked of them.
"""

from __future__ import annotations

import platform
from functools import partial

import numpy as np
from sklearn.model_selection import train_test_split

from . import minilm
from .cache import cached
from .python_sources import LABELS, Pool, pools
from .task import Options, Splits, Task, class_hits

SIZES = Splits(1000, 200, 500)
"""Texts of each task."""
TOKENS = 24
"""Length of the texts; most are shorter."""


def balanced(pool: Pool, count: int, rng: np.random.Generator) -> tuple[list[str], list[int]]:
    """Draw texts, as equally many of every label as there are, and label them by the label's place in the pool.

    Raises
    ------
    ValueError
        If the pool is too small.
    """
    available = sum(map(len, pool.values()))
    if available < count:
        raise ValueError(f"the task draws {count} texts, but this Python installation has {available}")
    texts, labels = [], []
    # The rarest first, so that what they lack is spread over the others.
    for place, (label, name) in enumerate(sorted(enumerate(pool), key=lambda item: len(pool[item[1]]))):
        share = min(len(pool[name]), (count - len(texts)) // (len(pool) - place))
        texts += [pool[name][i] for i in rng.choice(len(pool[name]), share, replace=False)]
        labels += [label] * share
    return texts, labels


def split_pool(pool: Pool, sizes: Splits, seed: int) -> Splits:
    """Texts and labels of each split, with equal shares of every label."""
    texts, labels = balanced(pool, sum(sizes), np.random.default_rng(seed))
    rest, test = train_test_split(range(len(texts)), test_size=sizes.test, random_state=seed, stratify=labels)
    left = [labels[i] for i in rest]
    train, validation = train_test_split(rest, test_size=sizes.validation, random_state=seed, stratify=left)
    return Splits(*([(texts[i], labels[i]) for i in part] for part in (train, validation, test)))


def asking(questions: list[str], parts: list[list[tuple[str, int]]]) -> list[tuple[str, int]]:
    """The texts and labels of all tasks, each text after its task's question."""
    return [(question + text, label) for question, part in zip(questions, parts) for text, label in part]


def build(seed: int, options: Options, asked: bool = False) -> Task:
    """Make the mixture; `asked`: each text begins with the name of its task."""
    found = cached(options.work / f"pytext-{platform.python_version()}.pt", pools)
    sizes = Splits(*(min(size, options.samples or size) for size in SIZES))
    splits = Splits(*zip(*(split_pool(pool, sizes, seed) for pool in found.values())))
    questions = [f"{name}: " if asked else "" for name in found]
    rows = [minilm.tokenised(*zip(*asking(questions, split)), TOKENS + 2 * asked) for split in splits]
    return Task(
        name="pytext-asked" if asked else "pytext",
        base=partial(minilm.new_classifier, LABELS, seed),
        rows=Splits(*rows),
        domains=Splits(*(np.repeat(np.arange(len(found)), size) for size in sizes)),
        **minilm.ADAPTED,
        hits=class_hits,
        epochs=1,
        batch_size=32,
        chance=100 / LABELS,
    )
