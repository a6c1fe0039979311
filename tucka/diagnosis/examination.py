"""The examination: every check in turn, and their table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

from torch import nn
from tqdm import tqdm

from ..calibration import device_of
from .files import save_and_reload
from .generation import cached_generation
from .gradients import checkpointed, checkpointed_reentrant, gradients_arrive
from .loads import dead_groups
from .padding import padding_invariance, padding_is_masked
from .parameters import finite_numbers, precision, router_started, what_trains
from .report import ERROR, Diagnosis, Row, skipped
from .routes import batch_invariance, forward_and_routes
from .start import disabled_adapter, identity_at_start
from .subject import Subject, examined

FORWARD = "forward and routes"

CHECKS: dict[str, Callable[[Subject], Row]] = {
    "finite numbers": finite_numbers,
    "precision": precision,
    "what trains": what_trains,
    "router started": router_started,
    "padding is masked": padding_is_masked,
    FORWARD: forward_and_routes,
    "batch invariance": batch_invariance,
    "padding invariance": padding_invariance,
    "cached generation": cached_generation,
    "gradients arrive": gradients_arrive,
    "checkpointing": checkpointed,
    "checkpointing, reentrant": checkpointed_reentrant,
    "save and reload": save_and_reload,
    "identity at start": identity_at_start,
    "disabled adapter": disabled_adapter,
    "dead groups": dead_groups,
}
"""The checks by name, in the order they run; those after the forward need it."""


def doctor(model: nn.Module, batch: Any, *, adapter_name: str | None = None, file: TextIO | None = None) -> Diagnosis:
    """Try what the method promises on a model of one's own, and print a table of what holds.

    Checked are: finite numbers and precision of the adapter, what trains and whether it is saved, padding that is
    masked, a route that depends neither on neighbours nor on padding, generation with and without a cache, gradients
    that arrive and do not change under checkpointing, an adapter that is saved and loaded as it is, outputs that are
    the base model's before training and with the adapter disabled, and groups that take no samples. Every line that
    fails says why and what to do; a check that does not apply is skipped with its reason.

    Training modes, parameters, gradients, random state, hooks, checkpointing and active adapters are left as found.
    For a moment the model holds a second copy of the adapter, and backward passes need the memory of half the batch.
    In a distributed run give the unwrapped model, and call it in every process.

    Parameters
    ----------
    model : PeftModel
        The adapted model, before, during or after training.
    batch : mapping, tuple or tensor
        One batch as the model takes it, with labels where there are some. Eight samples or more tell most; to judge
        dead groups, 23 for k=4, and a fair sample of the data.
    adapter_name : str, optional
        The adapter to examine; default: the active one.
    file : file, optional
        Where the table goes; default: `sys.stdout`.

    Returns
    -------
    Diagnosis
        The rows of the table; `Diagnosis.ok` says whether nothing failed.

    Raises
    ------
    ValueError
        If the model has no such adapter.

    Examples
    --------
    >>> tucka.doctor(model, next(iter(train_loader)))  # doctest: +SKIP
    """
    subject = Subject.of(model, batch, adapter_name)
    rows: list[Row] = []
    for name, check in tqdm(CHECKS.items(), desc="tucka.doctor", disable=None, leave=False):
        broken = any(row.check == FORWARD and row.outcome == ERROR for row in rows)
        row = skipped("the model does not run on this batch") if broken else _run(check, subject)
        rows.append(row._replace(check=name))
    diagnosis = Diagnosis(_title(subject), tuple(rows))
    (sys.stdout if file is None else file).write(f"{diagnosis}\n")
    return diagnosis


def _run(check: Callable[[Subject], Row], subject: Subject) -> Row:
    """One check; whatever it raises is its row, and the others go on."""
    try:
        with examined(subject):
            return check(subject)
    except Exception as error:
        return Row(
            ERROR,
            f"{type(error).__name__}: {' '.join(str(error).split())[:400]}",
            "The check could not run. If the message does not say what to change, see that model(**batch) runs "
            "without tucka.doctor, and report the message.",
        )


def _title(subject: Subject) -> str:
    config, layers = subject.config, len(subject.layers)
    return (
        f"tucka.doctor: adapter {subject.adapter_name!r} of {type(subject.base).__name__}\n"
        f"{layers} layers, k={config.k} t={config.t} p={config.p} r={config.r}, {config.routing} routing; a batch of "
        f"{subject.samples or '?'} samples on {device_of(subject.model)}"
    )
