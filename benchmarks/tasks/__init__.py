"""The tasks of the quality benchmark, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

from . import arithmetic, digits, sections, stdlib_text
from .task import Options, Rows, Splits, Task

TASKS: dict[str, Callable[[int, Options], Task]] = {
    "digits4": partial(digits.build, domains=4, conflict=False),
    "digits4-conflict": partial(digits.build, domains=4, conflict=True),
    "digits8": partial(digits.build, domains=8, conflict=False),
    "digits8-conflict": partial(digits.build, domains=8, conflict=True),
    "sections": sections.build,
    "pytext": stdlib_text.build,
    "pytext-asked": partial(stdlib_text.build, asked=True),
    "arithmetic": arithmetic.build,
}
"""Every task, and what makes it of a seed and `Options`."""


@lru_cache(maxsize=2)
def task_of(name: str, seed: int, options: Options) -> Task:
    """The task of a name and a seed, made once in a process.

    Raises
    ------
    ValueError
        If there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"tasks are {', '.join(TASKS)}, got {name!r}")
    return TASKS[name](seed, options)


__all__ = ["TASKS", "Options", "Rows", "Splits", "Task", "task_of"]
