"""Descriptions of Debian packages and the archive section of each: one domain, 30 classes."""

from __future__ import annotations

import gzip
import json
from functools import partial

import numpy as np

from . import minilm
from .task import Options, Splits, Task, class_hits, majority

SIZES = Splits(4000, 800, 2000)
TOKENS = 32


def build(seed: int, options: Options) -> Task:
    """Make the task from the file in `options`.

    Raises
    ------
    ValueError
        If the options name no file, or the file has fewer rows than the task takes.
    """
    if options.sections is None:
        raise ValueError("the task 'sections' reads a file: give it with --sections PATH/sections.json.gz")
    with gzip.open(options.sections, "rt") as file:
        data = json.load(file)
    sizes = Splits(*(min(size, options.samples or size) for size in SIZES))
    if len(data["train"]) < sizes.train + sizes.validation or len(data["test"]) < sizes.test:
        raise ValueError(
            f"the task takes {sizes.train} + {sizes.validation} training and {sizes.test} test rows, but "
            f"{options.sections} has {len(data['train'])} and {len(data['test'])}"
        )
    rng = np.random.default_rng(seed)
    order, test = rng.permutation(len(data["train"])), rng.permutation(len(data["test"]))[: sizes.test]
    chosen = Splits(
        [data["train"][i] for i in order[: sizes.train]],
        [data["train"][i] for i in order[sizes.train : sizes.train + sizes.validation]],
        [data["test"][i] for i in test],
    )
    rows = Splits(*(minilm.tokenised(*zip(*split), TOKENS) for split in chosen))
    return Task(
        name="sections",
        base=partial(minilm.new_classifier, len(data["labels"]), seed),
        rows=rows,
        domains=None,
        **minilm.ADAPTED,
        hits=class_hits,
        epochs=1,
        batch_size=32,
        chance=majority(rows.train.fields["labels"]),
    )
