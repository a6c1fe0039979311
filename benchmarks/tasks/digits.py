"""Handwritten digits from shifted domains, on a small vision transformer pretrained on upright ones.

Every training image occurs in every domain. In the tasks named "-conflict" each domain permutes the labels in its own
way, so that what is right for one domain is wrong for the others, and only the image tells the domain.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.fitting import fit

from .cache import cached
from .task import Options, Rows, Splits, Task, class_hits

CHECKERBOARD = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)
"""Signs of the 8×8 pixels in the domain "checkered"."""

SHIFTS = {
    "inverted": lambda images: 1 - images,
    "rotated": lambda images: images.rot90(1, (-2, -1)),
    "transposed": lambda images: 1 - images.mT,
    "rolled": lambda images: 0.5 * images.roll((3, 3), (-2, -1)),
    "mirrored": lambda images: images.flip(-1),
    "upended": lambda images: 1 - images.rot90(2, (-2, -1)),
    "checkered": lambda images: 0.5 + CHECKERBOARD * (images - 0.5),
    "swapped": lambda images: torch.cat([images[..., 4:, :], images[..., :4, :]], -2).flip(-2),
}
"""The domains, and what each does to images (N, 1, 8, 8) of values from 0 to 1."""

SIZE = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256)
EPOCHS = {4: 6, 8: 3}
"""Passes over the mixture by number of domains: as many steps for eight domains as for four."""


def split_images(labels: np.ndarray, seed: int) -> Splits:
    """Indices of 60 % of the images to train on, 15 % to validate and 25 % to test, equal shares of every digit."""
    indices = np.arange(len(labels))
    rest, test = train_test_split(indices, test_size=0.25, random_state=seed, stratify=labels)
    train, validation = train_test_split(rest, test_size=0.2, random_state=seed, stratify=labels[rest])
    return Splits(train, validation, test)


def permutations(domains: int, conflict: bool, seed: int) -> Tensor:
    """The new label of every old one in every domain, (domains, 10); the identity without conflict."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(10) if conflict else np.arange(10) for _ in range(domains)]
    return torch.from_numpy(np.stack(orders))


def new_vit() -> ViTForImageClassification:
    """An untrained ViT of 540,000 parameters for 8×8 images."""
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **SIZE))


def pretrained(rows: Rows, seed: int) -> dict[str, Tensor]:
    """Weights of a ViT trained on upright digits."""
    torch.manual_seed(seed)
    model = new_vit()
    fit(model, rows, epochs=30, batch_size=64, learning_rate=1e-3, seed=seed)
    return model.state_dict()


def build(seed: int, options: Options, domains: int, conflict: bool) -> Task:
    """Make the task of a number of domains, with or without conflicting labels."""
    digits = load_digits()
    count = options.samples or len(digits.target)
    images = torch.tensor(digits.images[:count] / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target[:count])
    splits = split_images(labels.numpy(), seed)
    upright = Rows({"pixel_values": images[splits.train], "labels": labels[splits.train]})
    # The weights depend on the training images alone, so all four tasks of a seed adapt the same model.
    weights = cached(options.work / f"digits-{seed}-{count}.pt", lambda: pretrained(upright, seed))
    orders = permutations(domains, conflict, seed)
    shifts = list(SHIFTS.values())[:domains]

    def base() -> ViTForImageClassification:
        model = new_vit().eval()
        model.load_state_dict(weights)
        return model

    def mixture(indices: np.ndarray) -> Rows:
        pixels = torch.cat([shift(images[indices]) for shift in shifts])
        return Rows({"pixel_values": pixels, "labels": torch.cat([order[labels[indices]] for order in orders])})

    return Task(
        name=f"digits{domains}{'-conflict' if conflict else ''}",
        base=base,
        rows=Splits(*map(mixture, splits)),
        domains=Splits(*(np.repeat(np.arange(domains), len(indices)) for indices in splits)),
        target_modules=("q_proj", "v_proj", "o_proj", "fc1", "fc2"),
        modules_to_save=("classifier",),
        hits=class_hits,
        epochs=EPOCHS[domains],
        batch_size=64,
        chance=10.0,
    )
