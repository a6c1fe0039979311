"""Handwritten digits from four shifted domains with conflicting labels, on a small ViT pretrained on upright ones.

Every training image occurs in every domain, and each domain permutes the labels in its own way: what is right for one
is wrong for the others, and only the image tells the domain.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common.rows import Rows, split
from common.training import processes
from filelock import FileLock
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

SHIFTS = {
    "inverted": lambda images: 1 - images,
    "rotated": lambda images: images.rot90(1, (-2, -1)),
    "transposed": lambda images: 1 - images.mT,
    "rolled": lambda images: 0.5 * images.roll((3, 3), (-2, -1)),
}
"""The domains, and what each does to images (N, 1, 8, 8) of values from 0 to 1."""

SIZE = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256)

EPOCHS, BATCH, PEAK = 20, 64, 1e-3
"""Length, batch size and peak learning rate of the pretraining."""

SHARES = (0.25, 0.15)
"""Of the test and of the validation split; the rest is trained on."""


class Digits(NamedTuple):
    """The mixture of the domains."""

    train: Rows
    validation: Rows
    test: Rows


def load(seed: int, samples: int | None = None) -> Digits:
    """Move the digits that scikit-learn bundles, or so many of them, into all domains; the seed permutes their labels.

    Which digits are trained on is the same for all seeds, so that none that is scored was seen in the pretraining.
    """
    images, labels = _upright(samples)
    rng = np.random.default_rng(seed)
    orders = {name: torch.from_numpy(rng.permutation(10)) for name in SHIFTS}
    test, validation, trained = split(labels, SHARES, seed=0)

    def mixture(indices: np.ndarray) -> Rows:
        pixels = torch.cat([shift(images[indices]) for shift in SHIFTS.values()])
        new = torch.cat([orders[name][labels[indices]] for name in SHIFTS])
        # In random order: where batches are routed, one of a single domain would give it away.
        order = np.random.default_rng(0).permutation(len(new))
        return Rows({"pixel_values": pixels[order], "labels": new[order]})

    return Digits(mixture(trained), mixture(validation), mixture(test))


def pretrained(directory: Path, samples: int | None = None, epochs: int | None = None) -> Path:
    """A directory with a ViT of 540,000 parameters that knows upright digits; made once, in under a minute.

    Parameters
    ----------
    directory : Path
        Where to keep it.
    samples : int, optional
        Cap on the digits.
    epochs : int, optional
        Length of the pretraining; default: `EPOCHS`.
    """
    epochs = epochs or EPOCHS
    path = directory / f"digits-vit-{samples or 'all'}-{epochs}"
    with processes().main_process_first(), FileLock(directory / f".{path.name}.lock"):
        if not path.exists():
            unfinished = path.with_suffix(".part")
            _pretrain(samples, epochs).save_pretrained(unfinished)
            unfinished.rename(path)
    return path


def _upright(samples: int | None) -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images[:samples] / 16, dtype=torch.float32).unsqueeze(1)
    return images, torch.tensor(digits.target[:samples])


def _pretrain(samples: int | None, epochs: int) -> ViTForImageClassification:
    """Train on the upright digits that are trained on later; one process does it while the others of a run wait."""
    images, labels = _upright(samples)
    *_, trained = split(labels, SHARES, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **SIZE))
        batches = [
            batch
            for _ in range(epochs)
            for batch in torch.from_numpy(trained)[torch.randperm(len(trained))].split(BATCH)
        ]
        optimizer = torch.optim.AdamW(model.parameters(), PEAK, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=len(batches))
        for batch in tqdm(batches, desc="pretraining a ViT on digits", unit=" steps", ncols=100, mininterval=0.5):
            model(pixel_values=images[batch], labels=labels[batch]).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()
