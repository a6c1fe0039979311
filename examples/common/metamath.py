"""MetaMathQA to learn from, GSM8K and MATH to be scored on: from the hub, or from folders in its layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets

from . import hub
from .answers import extract
from .exercises import Exercise

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
"""The prompt that MetaMath was published with."""

SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip


class Source(NamedTuple):
    """A repository of the hub, its configurations, and the columns of question and worked solution."""

    repository: str
    configurations: tuple[str | None, ...]
    question: str
    solution: str


TRAINING = Source("meta-math/MetaMathQA", (None,), "query", "response")

TESTS = {
    "gsm8k": Source("openai/gsm8k", ("main",), "question", "answer"),
    "math": Source("EleutherAI/hendrycks_math", SUBJECTS, "problem", "solution"),
}
"""What is scored, by name."""

ORIGINAL, HELD_OUT = "original_question", 0.03
"""Column of the question that a row of MetaMathQA rewrites; share of these kept from the training, to validate on."""


def training_exercises(path: Path | None, samples: int, validation: int) -> tuple[list[Exercise], list[Exercise]]:
    """Read exercises to train and to validate on; both are the same in every run.

    MetaMathQA rewrites each question of two training sets many times, so what is validated on rewrites questions of
    which the training has no rewriting.

    Parameters
    ----------
    path : Path, optional
        A directory in the place of the repository.
    samples, validation : int
        How many of each, at most.

    Raises
    ------
    ValueError
        If columns are missing.
    """
    rows = loaded(TRAINING, "train", path)
    originals = rows[ORIGINAL if ORIGINAL in rows.column_names else TRAINING.question]
    _, question = np.unique(np.asarray(originals, dtype=object).astype(str), return_inverse=True)
    rng = np.random.default_rng(42)
    count = question.max() + 1
    held = rng.permutation(count) < max(1, round(HELD_OUT * count))
    order = rng.permutation(len(rows))
    is_held = held[question[order]]
    train, valid = (rows.select(part) for part in (order[~is_held][:samples], order[is_held][:validation]))
    return list(_exercises(train, TRAINING, "metamath")), list(_exercises(valid, TRAINING, "metamath"))


def test_exercises(name: str, path: Path | None, samples: int | None) -> list[Exercise]:
    """Read the test split of "gsm8k" or "math", or so many exercises drawn from it.

    Raises
    ------
    ValueError
        If columns are missing.
    """
    rows = loaded(TESTS[name], "test", path)
    drawn = np.sort(np.random.default_rng(42).permutation(len(rows))[:samples])
    return list(_exercises(rows.select(drawn), TESTS[name], name))


def loaded(source: Source, split: str, path: Path | None) -> Dataset:
    """Load a split of all configurations; a directory without folders of their names is one data set."""
    parted = path is None or (path / "README.md").exists()
    names = [name for name in source.configurations if name is None or parted or (path / name).is_dir()]
    parts = [hub.dataset(source.repository, name, path)[split] for name in names or [None]]
    rows = concatenate_datasets(parts)
    missing = [column for column in (source.question, source.solution) if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"{path or source.repository} has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}"
        )
    return rows


def _exercises(rows: Dataset, source: Source, kind: str) -> Iterator[Exercise]:
    """Exercises of the rows whose solution ends in an answer."""
    for question, solution in zip(rows[source.question], rows[source.solution]):
        answer = extract(solution)
        if answer is not None:
            yield Exercise(PROMPT.format(question), solution, answer, kind)
