"""One way to train any model of the examples: the Hugging Face Trainer, resumed where it was interrupted.

Nothing here knows of one machine or many: under ``accelerate launch`` or ``torchrun`` every process calls the same.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from common.methods import is_routed
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import tucka
from tucka.callbacks import BalanceCallback

CHECKPOINTS = 4
"""How many checkpoints a training writes where it is not evaluated as it goes; the last is kept."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes
    ----------
    learning_rate : float
        At its peak.
    epochs : float
        Passes over the training rows.
    batch_size : int
        Rows in a step, of one process.
    schedule : str
        As transformers calls it.
    warmup : float
        Steps, or below 1 a share of all steps.
    weight_decay : float
        Of AdamW.
    evaluate_every : int, optional
        Steps between evaluations on the validation split, after which the best model is kept; default: the last one is.
    """

    learning_rate: float
    epochs: float
    batch_size: int
    schedule: str = "cosine"
    warmup: float = 0.06
    weight_decay: float = 0.0
    evaluate_every: int | None = None


class ProgressBar(TrainerCallback):
    """One titled line of progress, in place of the Trainer's own bar and logs."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Open the bar, where a resumed training goes on."""
        hidden = not state.is_world_process_zero
        sizes = dict(total=state.max_steps, initial=state.global_step, ncols=100, mininterval=0.5)
        self.bar = tqdm(desc=f"{self.title:<28}", unit=" steps", disable=hidden, **sizes)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Advance the bar."""
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Show the loss."""
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Close the bar."""
        self.bar.close()


def train(
    model: nn.Module,
    data: Dataset,
    args: argparse.Namespace,
    title: str,
    *,
    recipe: Recipe,
    seed: int,
    run: Path,
    collate: Callable | None = None,
    validation: Dataset | None = None,
    measure: Callable[[Any], Mapping[str, float]] | None = None,
    best: str | None = None,
) -> Trainer:
    """Train what is trainable, from the last whole checkpoint if there is one.

    Parameters
    ----------
    model : Module
        Returns an output with ``loss`` where the rows have labels.
    data : Dataset
        Training rows.
    args : Namespace
        The command line of the example: ``bf16`` is read.
    title : str
        Of the progress bar.
    recipe : Recipe
        How to train.
    seed : int
        Of the order of the rows, and of dropout.
    run : Path
        Directory of the checkpoints.
    collate : callable, optional
        From rows to a batch; default: transformers'.
    validation : Dataset, optional
        Evaluated every ``recipe.evaluate_every`` steps.
    measure : callable, optional
        From predictions and labels to named scores, as the Trainer's ``compute_metrics``.
    best : str, optional
        The score that the best model is told by.

    Returns
    -------
    Trainer
        With the trained model, in evaluation mode; its ``predict`` scores a split over all processes.
    """
    arguments = TrainingArguments(str(run), bf16=args.bf16, seed=seed, **_options(recipe, len(data), best, validation))
    balance = [BalanceCallback()] if is_routed(model) else []
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=data,
        eval_dataset=validation,
        compute_metrics=measure,
        callbacks=[ProgressBar(title), *balance],
    )
    trainer.remove_callback(PrinterCallback)
    if any(parameter.requires_grad for parameter in model.parameters()):
        trainer.train(resume_from_checkpoint=tucka.last_checkpoint(run))
    model.eval()
    return trainer


def processes() -> PartialState:
    """The processes of this run, of which there is one unless a launcher started more."""
    return PartialState(cpu=not torch.cuda.is_available())


def _options(recipe: Recipe, rows: int, best: str | None, validation: Dataset | None) -> dict[str, Any]:
    """The Trainer's options for a recipe."""
    evaluated = recipe.evaluate_every if validation is not None else None
    steps = math.ceil(recipe.epochs * math.ceil(rows / (recipe.batch_size * processes().num_processes)))
    every = evaluated or max(1, math.ceil(steps / CHECKPOINTS))
    chosen = dict(load_best_model_at_end=True, metric_for_best_model=best, greater_is_better=True)
    return dict(
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        # Where batches are routed as one, a prediction depends on their size.
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        logging_steps=max(1, steps // 20),
        eval_strategy="steps" if evaluated else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        report_to="none",
        log_level="error",
        log_level_replica="error",
        **(chosen if evaluated and best else {}),
    )
