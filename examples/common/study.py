"""What the examples do alike: adapt a model with several methods and seeds, score each, and compare them.

An example describes its `Task`; `compare` does the runs that the table of results lacks, and ends with a table and a
figure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.utils import broadcast_object_list
from common import figures, results
from common.methods import adapted, adapter_parameters, is_routed, method_of, settings_of, trainable_parameters
from common.options import sizes_of
from common.presets import preset_of
from common.training import Recipe, processes, train
from peft import LoraConfig
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import Trainer, default_data_collator, set_seed

import tucka
from analysis import LayerShape, layer_shapes

CALIBRATION = 512
"""Training rows that the methods read which start from data."""

Score = Callable[[Trainer, Dataset], float]


@dataclass(frozen=True)
class Task:
    """A pretrained model, and what to adapt it to.

    Attributes
    ----------
    dataset, model : str
        Their names in the table of results.
    base : callable
        Loads the pretrained model anew.
    train, validation, test : Dataset
        Rows as the model takes them, or as `collate` does.
    targets, heads : sequence of str
        Layers to adapt, and layers that every method trains whole.
    metric : str
        Name of the score; higher is better.
    recipe : Recipe
        How every method is trained; its learning rate is replaced by the method's.
    score : callable
        From the Trainer and a split to a score in percent, the same in every process.
    collate : callable
        From rows to a batch.
    task_type : str, optional
        PEFT's.
    rates : dict
        Learning rates by method, before those of `METHODS`.
    fields : dict
        Fields by method.
    measure, best : callable and str, optional
        For recipes that keep the best of several evaluations, see `training.train`.
    """

    dataset: str
    model: str
    base: Callable[[], nn.Module]
    train: Dataset
    validation: Dataset
    test: Dataset
    targets: Sequence[str]
    heads: Sequence[str]
    metric: str
    recipe: Recipe
    score: Score
    collate: Callable = default_data_collator
    task_type: str | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    measure: Callable | None = None
    best: str | None = None


def compare(example: str, args: argparse.Namespace, task_of: Callable[[int], Task]) -> pd.DataFrame:
    """Do the runs that the table of results lacks, then print and draw how the methods compare.

    Parameters
    ----------
    example : str
        Its name in the table.
    args : Namespace
        Its command line, see `options.parser_of`.
    task_of : callable
        From a seed to the task: the seed may draw splits, heads and labels.

    Returns
    -------
    DataFrame
        The averages of the runs asked for, see `results.averages`.
    """
    keys = []
    for seed in args.seed:
        task = task_of(seed)
        shapes = shapes_of(task)
        for method in args.method:
            keys.append(key_of(example, args, task, shapes, method, seed))
            row = _found(args.results, keys[-1])
            if row is None:
                run(args, task, method, keys[-1])
            elif processes().is_main_process:
                print(f"{title_of(keys[-1])}: {float(row['score']):.2f} is in {args.results}")
    return conclude(args, keys)


def published(args: argparse.Namespace, task: Task) -> Task:
    """The task as the paper trained it: its recipe, its sizes and those of its baselines.

    The learning rates of other methods than ``tucka-paper`` were not published; they keep theirs.
    """
    preset = preset_of(args.dataset)
    rates = {**task.rates, "tucka-paper": preset.recipe.learning_rate}
    fields = {**task.fields, **preset.baselines, "tucka-paper": preset.tucka}
    return replace(task, recipe=preset.recipe, rates=rates, fields=fields)


# --- what a run is ---------------------------------------------------------------------------------------------------


def recipe_for(args: argparse.Namespace, task: Task, method: str) -> Recipe:
    """The task's recipe with the method's learning rate, and with what the command line says."""
    rate = args.learning_rate or task.rates.get(_name(method)) or method_of(method)[0].learning_rate
    given = {name: value for name in ("epochs", "batch_size") if (value := getattr(args, name))}
    return replace(task.recipe, learning_rate=rate, **given)


def fields_for(args: argparse.Namespace, task: Task, method: str) -> dict[str, dict[str, Any]]:
    """A method's fields, and those of the TuckA configuration that sizes follow: arguments of `methods.adapted`."""
    given, own = sizes_of(args), dict(task.fields.get(_name(method), {}))
    if method_of(method)[0].is_tucka:
        own |= given
    return {"fields": own, "tucka_fields": {**task.fields.get("tucka", {}), **given}}


def shapes_of(task: Task) -> list[LayerShape]:
    """The layers that are adapted."""
    return layer_shapes(task.base(), LoraConfig(target_modules=list(task.targets), modules_to_save=list(task.heads)))


def key_of(
    example: str, args: argparse.Namespace, task: Task, shapes: Sequence[LayerShape], method: str, seed: int
) -> dict[str, Any]:
    """What tells a run from others, see `results.KEY`."""
    recipe = recipe_for(args, task, method)
    how = {
        name: getattr(recipe, name) for name in ("batch_size", "schedule", "warmup", "weight_decay", "evaluate_every")
    }
    how = {name: value for name, value in {**how, "bf16": args.bf16}.items() if value}
    return {
        "example": example,
        "dataset": task.dataset,
        "model": task.model,
        "method": method,
        "settings": {**settings_of(shapes, method, **fields_for(args, task, method)), **how},
        "seed": seed,
        "learning_rate": recipe.learning_rate,
        "epochs": float(recipe.epochs),
        "train_rows": len(task.train),
    }


def directory_of(args: argparse.Namespace, key: Mapping[str, Any]) -> Path:
    """Where checkpoints and adapter of a run lie; runs that differ in anything have different directories."""
    text = json.dumps(key, sort_keys=True, default=str)
    name = re.sub(r"[^\w.=-]+", "_", f"{key['dataset']}-{key['method']}-seed{key['seed']}")
    return args.output / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def title_of(key: Mapping[str, Any]) -> str:
    """A few words on a run."""
    return f"{key['dataset']} {key['method']}, seed {key['seed']}"


# --- doing it --------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, task: Task, method: str, key: Mapping[str, Any]) -> None:
    """Adapt, train, score, save, and write the row."""
    recipe, seed, directory = recipe_for(args, task, method), key["seed"], directory_of(args, key)
    started, started_cpu = time.perf_counter(), time.process_time()
    begun_before = tucka.last_checkpoint(directory) is not None
    set_seed(seed)
    model = adapted(
        task.base().to(processes().device),
        method,
        targets=task.targets,
        heads=task.heads,
        task_type=task.task_type,
        calibration=calibration_batches(task, recipe.batch_size, seed),
        **fields_for(args, task, method),
    )
    sizes = {
        "adapter_parameters": adapter_parameters(model, task.heads),
        "trainable_parameters": trainable_parameters(model),
    }
    trainer = train(
        model,
        task.train,
        args,
        title_of(key),
        recipe=recipe,
        seed=seed,
        run=directory,
        collate=task.collate,
        validation=task.validation,
        measure=task.measure,
        best=task.best,
    )
    scores = {"validation": task.score(trainer, task.validation), "score": task.score(trainer, task.test)}
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - started_cpu}
    if begun_before:  # what the part before the interruption took is not known
        seconds = {}
    measured = {name: round(value, 4) for name, value in {**scores, **seconds}.items()}
    save(trainer, directory / "adapter")
    if processes().is_main_process:
        results.append(args.results, {**key, **sizes, "metric": task.metric, **measured})
        for checkpoint in directory.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    processes().wait_for_everyone()


def calibration_batches(task: Task, size: int, seed: int) -> DataLoader:
    """Batches of training rows drawn at random."""
    drawn = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    return DataLoader(Subset(task.train, drawn.tolist()), batch_size=size, collate_fn=task.collate)


def save(trainer: Trainer, directory: Path) -> None:
    """Write the adapter, whole or not at all; a method without one writes its model."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_routed(model):
        tucka.save(model, directory, is_main_process=processes().is_main_process)
    elif processes().is_main_process:
        model.save_pretrained(directory)


def _found(path: Path, key: Mapping[str, Any]) -> dict[str, str] | None:
    """A run's row, or None; all processes go by what the first one reads."""
    row = [results.found(path, key) if processes().is_main_process else None]
    return broadcast_object_list(row)[0]


def _name(method: str) -> str:
    return method.partition(":")[0]


# --- what came of it -------------------------------------------------------------------------------------------------


def conclude(args: argparse.Namespace, keys: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Print the averages of some runs and where everything lies, and draw them."""
    table = results.averages(results.only(results.runs(args.results), keys))
    if processes().is_main_process:
        picture = figures.draw(table, args.output / f"{keys[0]['dataset']}.png")
        print(f"\n{as_text(table)}\n\nresults:  {args.results}\nfigure:   {picture}")
        for key in keys:
            print(f"adapter:  {directory_of(args, key) / 'adapter'}")
    return table


def as_text(table: pd.DataFrame) -> str:
    """A table of averages, for the terminal."""
    lines = [f"{'method':<24}{'adapter parameters':>20}{table['metric'].iloc[0]:>28}{'seconds':>10}"]
    for row in table.itertuples():
        score = f"{row.score:.2f}" + (f" ± {row.error:.2f} (n = {row.seeds})" if row.seeds > 1 else "")
        seconds = "" if math.isnan(row.seconds) else f"{row.seconds:.0f}"
        lines.append(f"{row.method:<24}{row.parameters:>20,}{score:>28}{seconds:>10}")
    return "\n".join(lines)
