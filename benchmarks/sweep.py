"""Score of adapters against their number of experts and parameters, on digits of several domains.

An objective for `analysis.sweep`: a short training of one method at one size, with the tasks and the training of the
quality benchmark.

    python -m analysis sweep benchmarks/sweeps/experts.json --jobs 2 --out docs/results/experts.csv
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig

from tucka import TuckAConfig

from .arms import METHODS, Arm, arm_of
from .fitting import GROUPS
from .tasks import TASKS, Options, task_of
from .training import train_and_score

TRAINING = {"task": str, "method": str, "lr": float, "epochs": float, "samples": int}
"""Settings that are not the method's own. The first three are needed; of images, all are taken by default."""

WORK = "TUCKA_BENCHMARK_WORK"
"""Environment variable with the directory of pretrained weights; default: out/quality."""

RESULTS = ("validation", "cpu_seconds", "nmi", "max_vio", "final_loss", "diverged")
"""What a row has beside score and parameters."""


def run(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train a method at a size, and score it on the test split.

    Parameters
    ----------
    settings : dict
        Those of `TRAINING`, and fields of the method's configuration: ``r``, ``k``, ``t``, ``p``, …
    seed : int
        Of the splits and the pretrained model as well as the training.
    """
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    options = Options(Path(os.environ.get(WORK, "out/quality")), None, settings.get("samples"))
    task = task_of(settings["task"], seed, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = train_and_score(task, _arm(settings), settings["lr"], seed, epochs=settings.get("epochs"))
    found = {"score": row["test"], "parameters": row["adapter_parameters"]}
    if "k" in settings:
        found["experts"] = settings["k"] * settings.get("t", 1)
    return found | {name: row.get(name) for name in RESULTS}


def check(settings: dict[str, Any]) -> None:
    """Reject settings that no run could have.

    Raises
    ------
    ValueError
        If a task, method or field is unknown, or TuckA's configuration cannot be.
    """
    missing = [name for name in ("task", "method", "lr") if name not in settings]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given")
    if settings["task"] not in TASKS:
        raise ValueError(f"tasks are {', '.join(TASKS)}, got {settings['task']!r}")
    _arm(settings)
    own, method = _own(settings), settings["method"]
    config = TuckAConfig if method.startswith("tucka") else METHODS[method].config if method in METHODS else PeftConfig
    unknown = sorted(set(own) - set(config.__dataclass_fields__) - set(GROUPS))
    if unknown:
        raise ValueError(f"{method} has no {', '.join(unknown)}")
    if config is TuckAConfig:
        config(**{name: value for name, value in own.items() if name not in GROUPS})


def _own(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in TRAINING}


def _arm(settings: dict[str, Any]) -> Arm:
    listed = ",".join(f"{name}={value}" for name, value in _own(settings).items())
    return arm_of(f"{settings['method']}:{listed}" if listed else settings["method"])
