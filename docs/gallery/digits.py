"""The model of the gallery: a small vision transformer, adapted to digits of four shifted domains in a few seconds.

Every domain permutes the labels in its own way, so what is right for one is wrong for the others, and nothing but the
images tells them apart. `examples/quickstart.py` does the same at a size that says something about accuracy.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import transformers
from peft import PeftModel
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import tucka
from tucka.callbacks import BalanceCallback

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)

SHIFTS = {
    "inverted": lambda images: 1 - images,
    "rotated": lambda images: images.rot90(1, (-2, -1)),
    "transposed": lambda images: 1 - images.mT,
    "rolled": lambda images: 0.5 * images.roll((3, 3), (-2, -1)),
}
"""The domains, and what each does to images (N, 1, 8, 8) of values from 0 to 1."""

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
TARGETS = ["q_proj", "v_proj", "o_proj", "fc1", "fc2"]


class Adapted(NamedTuple):
    """What training left behind."""

    base: ViTForImageClassification  # before adaptation
    model: PeftModel
    log: list[dict]  # of the Trainer


@cache
def adapted(learning_rate: float = 8e-3, epochs: int = 6) -> Adapted:
    """Pretrain on upright digits, then adapt to the domains; once in a process."""
    torch.manual_seed(0)
    base = ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **SIZES),
    )
    images, labels = upright(0, 1000)
    _train(base, _rows(images, labels), epochs=12, learning_rate=3e-3)
    full = dict(r=6, block_size=None, axis_block_size=None, trainable="all", init_experts="gradient")
    config = tucka.TuckAConfig(**full, k=4, t=2, p=2, target_modules=TARGETS, modules_to_save=["classifier"])
    domains = [_shifted(name, 0, 400) for name in SHIFTS]
    rows = [row for images, labels in domains for row in _rows(images, labels)]
    torch.manual_seed(0)
    calibration = torch.utils.data.DataLoader(rows, batch_size=128, shuffle=True)
    model = tucka.apply(copy.deepcopy(base), config, calibration=calibration, calibration_samples=256, progress=False)
    log = _train(model, rows, epochs, learning_rate, callbacks=[BalanceCallback()])
    return Adapted(base.eval(), model.eval(), log)


def held_out(size: int = 128) -> list[dict]:
    """Held-out digits of all domains, with the name of the domain of each."""
    batches = []
    for name in SHIFTS:
        images, labels = _shifted(name, 1000, 1000 + size)
        batches.append({"pixel_values": images, "labels": labels, "domain": np.repeat(name, len(labels))})
    return batches


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    """Share of the held-out digits that a model classifies as their domain has it, in percent."""
    hits = [model(batch["pixel_values"]).logits.argmax(-1) == batch["labels"] for batch in held_out()]
    return 100 * torch.cat(hits).double().mean().item()


def upright(first: int, last: int) -> tuple[Tensor, Tensor]:
    """Digits of scikit-learn, (N, 1, 8, 8) from 0 to 1, and what they are."""
    digits = load_digits()
    images = torch.tensor(digits.images[first:last] / 16, dtype=torch.float32).unsqueeze(1)
    return images, torch.tensor(digits.target[first:last])


def _shifted(domain: str, first: int, last: int) -> tuple[Tensor, Tensor]:
    images, labels = upright(first, last)
    permutation = np.random.default_rng(list(SHIFTS).index(domain)).permutation(10)
    return SHIFTS[domain](images), torch.from_numpy(permutation)[labels]


def _rows(images: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels)]


def _train(model, rows, epochs: int, learning_rate: float, callbacks=()) -> list[dict]:
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        num_train_epochs=epochs,
        per_device_train_batch_size=50,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        logging_steps=8,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer.state.log_history
