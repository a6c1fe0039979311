"""One way to train any model of the benchmark: the Hugging Face Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

GROUPS = {
    "factor_lr": ("input_factor", "output_factor", "expert_factor"),
    "shared_lr": ("shared_core", "axis_core"),
    "core_lr": ("core", "shared_core", "axis_core"),
    "router_lr": ("centroids",),
    "head_lr": ("modules_to_save",),
}
"""Multipliers of the learning rate that an arm may set, and a part of the names of the parameters they are for; of
several that an arm sets for a parameter, the first counts."""

POINTS = 20
"""How many mean losses, of equally long stretches of the training, are kept."""


def optimiser_groups(model: nn.Module, learning_rate: float, multipliers: Mapping[str, float]) -> list[dict[str, Any]]:
    """Sort what trains into groups of one learning rate.

    Raises
    ------
    ValueError
        If a multiplier is not one of `GROUPS`.
    """
    unknown = sorted(set(multipliers) - set(GROUPS))
    if unknown:
        raise ValueError(f"multipliers are {', '.join(GROUPS)}, got {unknown[0]!r}")
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = (key for key, parts in GROUPS.items() if key in multipliers and set(parts) & set(name.split(".")))
            groups.setdefault(multipliers.get(next(own, ""), 1.0), []).append(parameter)
    return [{"params": parameters, "lr": learning_rate * factor} for factor, parameters in groups.items()]


def fit(
    model: nn.Module,
    rows: Dataset,
    *,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    seed: int,
    multipliers: Mapping[str, float] | None = None,
) -> list[float]:
    """Train with AdamW without weight decay, 6 % linear warm-up, then a cosine.

    Returns the mean losses of `POINTS` stretches. The model stays on its device and is left in evaluation mode; one
    without trainable parameters is left as it is.
    """
    groups = optimiser_groups(model, learning_rate, multipliers or {})
    if not groups:
        return []
    steps = max(1, round(epochs * -(-len(rows) // batch_size)))
    with tempfile.TemporaryDirectory() as unused:
        arguments = TrainingArguments(
            output_dir=unused,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.06,
            seed=seed,
            use_cpu=next(model.parameters()).device.type == "cpu",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_steps=max(1, steps // POINTS),
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
        )
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0)
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
