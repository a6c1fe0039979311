"""Classify images with a pretrained vision transformer: TuckA beside PEFT's methods.

1. The data. By default the handwritten digits of scikit-learn in four shifted domains whose labels conflict, on a small
   ViT that the example pretrains, once, on upright ones. Or ten images of each class of CIFAR-100, Food-101 or
   Caltech-256 on ViT-base, as in the paper.
2. Every method adapts the same model, and trains the same head; PEFT's get at least TuckA's number of parameters.
3. Each is scored once on images that nothing was chosen by, and saved. A run that is in the table is not repeated, and
   one that was interrupted goes on from its last checkpoint.

    python examples/image_classification.py --method tucka lora --seed 0 1 2
    python examples/image_classification.py --dataset cifar100 --preset paper --method tucka-paper lora
    accelerate launch examples/image_classification.py --dataset food101 --bf16 --method tucka lora

Images are flipped at random in training only, and two more images of each class of the training split are held out to
choose models by. The paper's scripts flip the images they score too, and choose the epoch by them. All other images of
Caltech-256, which has no splits, are scored.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from common import digits, hub
from common.classification import scored_by, targets_of
from common.options import parser_of, read
from common.presets import PRESETS
from common.study import Task, compare, published
from common.training import Recipe
from datasets import Dataset, DatasetDict, concatenate_datasets
from PIL import ImageOps
from sklearn.metrics import accuracy_score
from transformers import AutoImageProcessor, AutoModelForImageClassification

EXAMPLE = "image_classification"


class Source(NamedTuple):
    """A dataset of the hub: its columns, and the split that is scored (None: whatever is not trained on)."""

    repository: str
    image: str
    label: str
    scored: str | None


SOURCES = {
    "cifar100": Source("uoft-cs/cifar100", "img", "fine_label", "test"),
    "food101": Source("ethz/food101", "image", "label", "validation"),
    "caltech256": Source("ilee0022/Caltech-256", "image", "label", None),
}

PER_CLASS, HELD_OUT, SUBSET = 10, 2, 42
"""Images of each class to train on, and to choose by; and the seed that draws them, the same for all runs."""

OFFLINE = Recipe(1e-3, epochs=4, batch_size=64)
ONLINE = Recipe(1e-3, epochs=20, batch_size=32, warmup=20)

RATES: dict[str, dict[str, float]] = {
    "offline": {"lora": 8e-3, "rslora": 8e-3, "dora": 8e-3, "full": 5e-4},
    "online": {"full": 5e-5, "tucka": 8e-3},
}
"""Learning rates where they are not those of `METHODS`."""


def offline(args: argparse.Namespace, seed: int) -> Task:
    """Shifted digits, whose labels the seed permutes."""
    source = args.model or digits.pretrained(args.output, args.samples)
    mixture = digits.load(seed, args.samples)
    return Task(
        dataset="digits",
        model=args.model or "digits-vit",
        base=partial(AutoModelForImageClassification.from_pretrained, source),
        train=mixture.train,
        validation=mixture.validation,
        test=mixture.test,
        recipe=OFFLINE,
        rates=RATES["offline"],
        targets=targets_of(source),
        heads=["classifier"],
        **scored_by("accuracy (%)", accuracy_score),
    )


def online(args: argparse.Namespace, seed: int) -> Task:
    """A few images of each class of a dataset of the hub."""
    where, source = SOURCES[args.dataset], args.model or PRESETS[args.dataset].model
    parts = hub.dataset(where.repository, path=args.dataset_path)
    trained, validation, test = few_shot(parts, where)
    processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    # Some copies of a dataset count its classes from 1.
    number = {label: place for place, label in enumerate(sorted(set(trained[where.label][:])))}

    def rows(part: Dataset, flips: bool) -> Dataset:
        return part.with_transform(partial(pixels, where=where, processor=processor, number=number, flips=flips))

    task = Task(
        dataset=args.dataset,
        model=source,
        base=partial(classifier, source, len(number)),
        train=rows(trained.select(range(min(len(trained), args.samples or len(trained)))), flips=True),
        validation=rows(validation, flips=False),
        test=rows(test, flips=False),
        recipe=ONLINE,
        rates=RATES["online"],
        targets=targets_of(source),
        heads=["classifier"],
        **scored_by("accuracy (%)", accuracy_score),
    )
    return published(args, task) if args.preset else task


def few_shot(parts: DatasetDict, where: Source) -> tuple[Dataset, Dataset, Dataset]:
    """Draw the images to train on and to choose by, and what is scored: a split, or all the others.

    Raises
    ------
    ValueError
        If a class has too few images.
    """
    known = concatenate_datasets([part for name, part in parts.items() if name != where.scored])
    labels = np.asarray(known[where.label][:])
    rng, kinds = np.random.default_rng(SUBSET), []
    for label in np.unique(labels):
        of_class = rng.permutation(np.flatnonzero(labels == label))
        if len(of_class) < PER_CLASS + HELD_OUT:
            raise ValueError(
                f"{PER_CLASS} + {HELD_OUT} images of each class are drawn, but class {label} has {len(of_class)}"
            )
        kinds.append(np.split(of_class, [PER_CLASS, PER_CLASS + HELD_OUT]))
    # In random order, so that a cap on the rows leaves some of every class.
    trained, validation, others = (rng.permutation(np.concatenate(part)) for part in zip(*kinds))
    scored = known.select(np.sort(others)) if where.scored is None else parts[where.scored]
    return known.select(trained), known.select(validation), scored


def pixels(
    batch: dict[str, list], where: Source, processor: Any, number: dict[int, int], flips: bool
) -> dict[str, Any]:
    """The model's arguments for some images; half of them mirrored at random where they are trained on."""
    images = [image.convert("RGB") for image in batch[where.image]]
    if flips:
        images = [ImageOps.mirror(image) if torch.rand(()) < 0.5 else image for image in images]
    labels = [number[label] for label in batch[where.label]]
    return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": labels}


def classifier(source: str | Path, classes: int) -> torch.nn.Module:
    """A pretrained encoder with a fresh head, in single precision: half precision is for computing, see --bf16."""
    return AutoModelForImageClassification.from_pretrained(
        source, num_labels=classes, dtype=torch.float32, ignore_mismatched_sizes=True
    )


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Run the example; the averages of the methods that were compared."""
    args = read(parser_of(__doc__, EXAMPLE, ["offline", *SOURCES]), argv)
    build = offline if args.dataset == "offline" else online
    return compare(EXAMPLE, args, partial(build, args))


if __name__ == "__main__":
    main()
