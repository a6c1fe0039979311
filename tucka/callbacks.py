"""A callback of the transformers Trainer that logs how evenly the groups are used, and revives dead ones.

Kept out of ``import tucka``: ``from tucka.callbacks import BalanceCallback``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .balance import Load, RouterLoads, coefficient_of_variation, entropy, loads_of, max_violation
from .model import dispatchers_of
from .revival import Revival, revive


class BalanceCallback(TrainerCallback):
    """Log the load of every group with whatever the Trainer logs.

    With ``logging_steps=50`` a log of training holds the load of those 50 steps: ``load/max_violation``,
    ``load/entropy``, ``load/cv``, ``load/units`` and the shares ``load/group_0`` …; a log of an evaluation the load of
    that evaluation, as ``eval_load/…``. Models with several towers have ``load/<tower>/…``. In a distributed run the
    processes are added up. Counting waits for nothing; the device is read once per log.

    Parameters
    ----------
    adapter_name : str, optional
        Whose load; default: that of the adapter active when training begins.
    revive_every : int, optional
        Run `tucka.revival.revive` after every so many optimiser steps; ``load/revived`` then counts the groups revived
        since the last log.
    calibration : iterable, optional
        Batches for the revival; needs to be iterable more than once, so a list or a DataLoader.
    threshold, samples
        As in `tucka.revival.revive`.

    Attributes
    ----------
    loads : dict of RouterLoads
        What was counted since the last log, by tower name; kept after training.
    revivals : list of (int, dict of Revival)
        The step and the report of every revival of the last training.

    Raises
    ------
    ValueError
        If `revive_every` is below 1, or has no `calibration` that can be read more than once.

    Notes
    -----
    The Trainer's own reporting callbacks (TensorBoard, W&B) run before those it is given, and so report before this
    one has written. `add_to` registers it in front of them.
    """

    def __init__(
        self,
        adapter_name: str | None = None,
        *,
        revive_every: int | None = None,
        calibration: Iterable[Any] | None = None,
        threshold: float = 0.1,
        samples: int = 512,
    ) -> None:
        if revive_every is not None and revive_every < 1:
            raise ValueError(f"revive_every={revive_every} is not a number of steps of at least 1")
        if revive_every is not None and calibration is None:
            raise ValueError(f"revive_every={revive_every} needs calibration batches to split the busiest group by")
        if calibration is not None and iter(calibration) is calibration:
            raise ValueError("calibration is an iterator, which can be read once; a revival reads it each time")
        self.adapter_name = adapter_name
        self.revive_every = revive_every
        self.calibration = calibration
        self.threshold = threshold
        self.samples = samples
        self.loads: dict[str, RouterLoads] = {}
        self.revivals: list[tuple[int, dict[str, Revival]]] = []
        self._unlogged_revivals = 0
        self._recorded: nn.Module | None = None

    def add_to(self, trainer: Any) -> None:
        """Register with a Trainer in front of its reporting callbacks, so that they report the load as well."""
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]

    def stop(self) -> None:
        """Stop counting, as a training that raised leaves to its caller; what was counted stays in `loads`."""
        if self._recorded is None:
            return
        # By identity and not by putting back what was found: others may record in between and end later.
        ours = list(self.loads.values())
        for dispatcher in dispatchers_of(self._recorded).values():
            kept = [(name, to) for name, to in dispatcher.current.recordings if not any(to is own for own in ours)]
            dispatcher.current.recordings = tuple(kept)
        self._recorded = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start counting, from zero and once, also after a training that raised."""
        self.stop()
        name, self.loads = loads_of(model, self.adapter_name)
        self.revivals, self._unlogged_revivals = [], 0
        self._recorded = model
        dispatchers: dict[str, Any] = dict(dispatchers_of(model))
        for tower, loads in self.loads.items():
            current = dispatchers[tower].current
            current.recordings = (*current.recordings, (name, loads))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Revive dead groups when it is time to."""
        if self.revive_every is None or self.calibration is None or state.global_step % self.revive_every:
            return
        report = revive(
            model,
            self.calibration,
            adapter_name=self.adapter_name,
            threshold=self.threshold,
            samples=self.samples,
        )
        self.revivals.append((state.global_step, report))
        self._unlogged_revivals += sum(len(revival.pairs) for revival in report.values())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the loads to the log, then count anew."""
        if self._recorded is None or logs is None:
            return
        found = {**self._metrics("load", "training"), **self._metrics(f"{_evaluation_of(logs)}_load", "evaluation")}
        if self.revive_every is not None:
            found["load/revived"] = float(self._unlogged_revivals)
        for loads in self.loads.values():
            loads.reset()
        self._unlogged_revivals = 0
        logs.update(found)
        # The Trainer has copied the log into its history before it calls its callbacks.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting."""
        self.stop()

    def _metrics(self, prefix: str, phase: str) -> dict[str, float]:
        """The load of every tower in training or evaluation; nothing where no unit was counted."""
        found: dict[str, float] = {}
        for tower, loads in self.loads.items():
            load = (loads.training if phase == "training" else loads.evaluation).load(across_processes=True)
            start = f"{prefix}/{tower}/" if len(self.loads) > 1 else f"{prefix}/"
            found.update({start + name: value for name, value in load_metrics(load).items()})
        return found


def load_metrics(load: Load) -> dict[str, float]:
    """A load as numbers: ``max_violation``, ``entropy``, ``cv``, ``units`` and the share of every group.

    Empty if no unit was counted. Waits for the device once.
    """
    share = load.group_share
    measures = [max_violation(share), entropy(share), coefficient_of_variation(share), load.units.to(share.dtype)]
    names = ["max_violation", "entropy", "cv", "units", *(f"group_{index}" for index in range(len(share)))]
    found = dict(zip(names, torch.cat([torch.stack(measures), share]).tolist()))
    return found if found["units"] else {}


def _evaluation_of(logs: dict[str, Any]) -> str:
    """The prefix of an evaluation's metrics, which differs where there are several evaluation sets."""
    endings = [key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")]
    return next((name for name in endings if name != "train"), "eval")
