"""What the examples that classify share: how predictions are scored, and which layers are adapted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import AutoConfig, EvalPrediction, Trainer

from tucka.targets import DEFAULT_TARGETS


def scored_by(name: str, metric: Callable[[np.ndarray, np.ndarray], float]) -> dict[str, Any]:
    """The fields of a `study.Task` that say how it is scored.

    Parameters
    ----------
    name : str
        Of the score, in percent.
    metric : callable
        From labels and predicted labels, both (N,), to a number of at most 1.
    """

    def measure(found: EvalPrediction) -> dict[str, float]:
        return {"score": 100 * float(metric(found.label_ids, found.predictions.argmax(-1)))}

    def score(trainer: Trainer, rows: Dataset) -> float:
        return trainer.predict(rows).metrics["test_score"]

    return dict(metric=name, score=score, measure=measure, best="score")


def targets_of(source: str | Path) -> list[str]:
    """The layers of a pretrained model to adapt, which are those of the paper where it has them.

    Raises
    ------
    ValueError
        If the architecture is not known.
    """
    architecture = AutoConfig.from_pretrained(source).model_type
    if architecture not in DEFAULT_TARGETS:
        raise ValueError(f"layers to adapt are known for {', '.join(DEFAULT_TARGETS)}; {source} is a {architecture}")
    return DEFAULT_TARGETS[architecture]
