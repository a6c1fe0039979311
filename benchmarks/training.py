"""One run: adapt a pretrained model with an arm, and score it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from sklearn.metrics import normalized_mutual_info_score
from torch import nn
from torch.utils.data import DataLoader, default_collate

import tucka
from tucka import TuckAConfig

from .arms import Arm, tucka_size
from .fitting import fit
from .sizing import adapter_parameters, trainable_parameters
from .tasks import Rows, Task

CALIBRATION_SAMPLES, CALIBRATION_BATCH = 512, 64
PACKAGES = ("torch", "peft", "transformers", "tucka")


class Scores(NamedTuple):
    """Hits in percent, and the chosen group of every sample where each sample is routed by itself."""

    hits: float
    groups: np.ndarray | None


def identity_of(
    task: Task, arm: Arm, learning_rate: float | None, seed: int, epochs: float | None = None
) -> dict[str, Any]:
    """What tells this run from others: the columns of `results.KEY`."""
    return {
        "task": task.name,
        "arm": arm.name,
        "settings": json.dumps(arm.settings(task), sort_keys=True),
        "seed": seed,
        "learning_rate": learning_rate,
        "epochs": float(epochs or task.epochs),
        "train_rows": len(task.rows.train),
    }


def train_and_score(
    task: Task, arm: Arm, learning_rate: float, seed: int, *, epochs: float | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Adapt a fresh base model and score it; the columns of `results.COLUMNS`.

    The seed fixes the arm's start and the order of the samples; the task was made with the same seed. Settings follow
    the task, see `Arm.settings`.
    """
    row = identity_of(task, arm, learning_rate, seed, epochs)
    started, started_cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(seed)
    model = arm.build(
        task.base().to(device), task, arm.settings(task), calibration_batches(task.rows.train, seed, device)
    )
    built = time.perf_counter()
    row["adapter_parameters"] = adapter_parameters(model, task)
    row["trainable_parameters"] = trainable_parameters(model)
    losses = fit(
        model,
        task.rows.train,
        epochs=row["epochs"],
        batch_size=task.batch_size,
        learning_rate=learning_rate,
        seed=seed,
        multipliers=arm.multipliers,
    )
    validation, test = (score(model, rows, task) for rows in task.rows[1:])
    row["validation"], row["test"] = round(validation.hits, 4), round(test.hits, 4)
    row["seconds"] = round(time.perf_counter() - started, 2)
    # What a run costs when other processes share the cores.
    row["cpu_seconds"] = round(time.process_time() - started_cpu, 2)
    row["calibration_seconds"] = round(built - started, 2) if arm.calibrated else None
    if validation.groups is not None:
        if task.domains is not None:
            row["nmi"] = float(normalized_mutual_info_score(task.domains.validation, validation.groups))
        row["max_vio"] = max_violation(test.groups, model.active_peft_config.k)
    row["final_loss"] = losses[-1] if losses else None
    row["diverged"] = has_diverged(losses, label_entropy(task.rows.train))
    row["note"] = size_note(row["adapter_parameters"], tucka_size(task)) if arm.sized else None
    row["versions"] = " ".join(f"{name}={version(name)}" for name in PACKAGES)
    return row


def calibration_batches(rows: Rows, seed: int, device: str) -> DataLoader:
    """Batches of samples drawn from the training set, on the model's device."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_SAMPLES]

    def collate(samples: list[dict]) -> dict:
        return {name: values.to(device) for name, values in default_collate(samples).items()}

    return DataLoader(rows.take(order), batch_size=CALIBRATION_BATCH, collate_fn=collate)


@torch.no_grad()
def score(model: nn.Module, rows: Rows, task: Task) -> Scores:
    """Score all samples, in the batches of the training: where batches are routed, their size matters."""
    routed = isinstance(model, PeftModel) and isinstance(model.active_peft_config, TuckAConfig)
    device = next(model.parameters()).device
    hits, groups = [], []
    for batch in rows.batches(task.batch_size):
        batch = {name: values.to(device) for name, values in batch.items()}
        with tucka.record_routes(model) if routed else nullcontext([]) as routes:
            hits.append(task.hits(model, batch).float().cpu())
        # Decoding adds a route per token, all equal to the first, which is the prompt's.
        groups += [route.group.cpu() for route in routes[:1]]
    by_sample = sum(map(len, groups)) == len(rows)
    return Scores(100 * torch.cat(hits).mean().item(), torch.cat(groups).numpy() if by_sample else None)


def max_violation(groups: np.ndarray, count: int) -> float:
    """Largest load of a group over the mean load, minus one."""
    loads = torch.from_numpy(np.bincount(groups, minlength=count)).double()
    return float(tucka.balance.max_violation(loads))


def label_entropy(rows: Rows) -> float:
    """Loss in nats of the best constant prediction."""
    labels = rows.fields["labels"]
    shares = labels[labels != -100].unique(return_counts=True)[1].double()
    return torch.distributions.Categorical(shares).entropy().item()


def has_diverged(losses: Sequence[float], guessing: float) -> bool:
    """Whether a training ended at no finite loss, hardly under that of guessing, or far above where it had been."""
    if not losses:
        return False
    return not math.isfinite(losses[-1]) or losses[-1] > min(0.95 * guessing, 1.5 * min(losses) + 0.05 * guessing)


def size_note(parameters: int, at_least: int) -> str | None:
    """What a row says of a method that does not reach the size asked for."""
    return (
        f"trains {parameters} parameters, fewer than the {at_least} of TuckA's default"
        if parameters < at_least
        else None
    )
