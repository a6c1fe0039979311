"""A callback of the transformers Trainer that shows the experts in TensorBoard while they are trained.

Kept out of ``import analysis``: ``from analysis.live import FigureCallback``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainerCallback

from tucka.calibration import as_found
from tucka.model import single_adapter_name

from .adapters import adapter_of
from .figures import Inputs, draw
from .observations import observe
from .styles import style

logger = logging.getLogger(__name__)

FROM_WEIGHTS = ("core-slices", "expert-similarity", "layer-group-similarity", "spectra")
"""Names in `analysis.figures.FIGURES`."""


class FigureCallback(TrainerCallback):
    """Log figures of the adapter to TensorBoard, and with calibration batches the loads of the groups.

    Figures stand under ``experts/<name>``, loads under ``calibration_load/group_0`` …; models with several towers have
    ``experts/<name>/<tower>`` and ``calibration_load/<tower>/…``. Training goes on as if nothing had been drawn: modes,
    gradients, random states and counted loads are left as they are, and a figure that cannot be drawn is logged and
    skipped. Without the package tensorboard the callback warns once and does nothing.

    Parameters
    ----------
    directory : str or Path
        Where TensorBoard's event files go.
    every : int, optional
        Optimiser steps between two drawings; default: draw after every evaluation.
    calibration : iterable, optional
        Batches of the model, which are read at every drawing; a list or a DataLoader. They add the figures of the
        router and of the movement, and the loads.
    labels : str, optional
        Entry of the batches with a class, domain or task per sample; adds the figure "flow".
    samples : int
        How many samples of the batches are used.
    layer : str, optional
        Layer whose slices and experts are drawn; default: the first.
    adapter_name : str, optional
        Default: the adapter active at the time.

    Raises
    ------
    ValueError
        If `every` is below 1, `calibration` can be read only once, or `labels` come without it.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every: int | None = None,
        calibration: Iterable[Any] | None = None,
        labels: str | None = None,
        samples: int = 256,
        layer: str | None = None,
        adapter_name: str | None = None,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every={every} is not a number of steps of at least 1")
        if calibration is not None and iter(calibration) is calibration:
            raise ValueError("calibration is an iterator, which can be read once; figures are drawn again and again")
        if labels is not None and calibration is None:
            raise ValueError(f"labels={labels!r} is an entry of the calibration batches, but there are none")
        self.directory, self.every = Path(directory), every
        self.calibration, self.labels, self.samples = calibration, labels, samples
        self.layer, self.adapter_name = layer, adapter_name
        self._writer: Any = None
        self._draws = self._warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the event file, in the first process."""
        self._close()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            if not self._warned:
                logger.warning("figures are not logged: the package tensorboard is missing (pip install tensorboard)")
            self._warned = True
            return
        self._draws = True
        if state.is_world_process_zero:
            self._writer = SummaryWriter(str(self.directory))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Draw when it is time to."""
        if self.every is not None and state.global_step % self.every == 0:
            self.show(model, state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Draw after an evaluation, unless a number of steps was asked for."""
        if self.every is None:
            self.show(model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the event file."""
        self._close()

    def show(self, model: nn.Module, step: int) -> None:
        """Log everything for a model at a step; nothing while no training is under way."""
        if not self._draws:
            return
        with as_found(model):
            try:
                inputs = self._inputs(model)
            except ValueError as error:
                logger.warning("figures of step %d are not logged: %s", step, error)
                return
            # Every process has run the batches, for a model may be spread over them; one of them writes.
            if self._writer is None:
                return
            with style("notebook"):
                self._figures(inputs, step)
            self._loads(inputs, step)
        self._writer.flush()

    def _inputs(self, model: nn.Module) -> Inputs:
        name = single_adapter_name(model, self.adapter_name)
        observed = None
        if self.calibration is not None:
            observed = observe(
                model,
                self.calibration,
                samples=self.samples,
                labels=self.labels,
                adapter_name=name,
                progress=False,
            )
        adapter = adapter_of(model, name) if observed is None else observed.adapter
        return Inputs(adapter=adapter, observed=observed, layer=self.layer)

    def _figures(self, inputs: Inputs, step: int) -> None:
        for name in FROM_WEIGHTS:
            self._figure(name, f"experts/{name}", inputs, step)
        observed = inputs.observed
        if observed is None:
            return
        self._figure("movement", "experts/movement", inputs, step)
        names = ("router-map",) if observed.labels is None else ("router-map", "flow")
        for tower in observed.routing:
            for name in names:
                self._figure(name, f"experts/{name}{_under(tower)}", inputs._replace(tower=tower), step)

    def _figure(self, name: str, tag: str, inputs: Inputs, step: int) -> None:
        try:
            figure = draw(name, inputs).figure
        except ValueError as error:
            logger.warning("figure %s of step %d is not logged: %s", name, step, error)
            return
        # It was made without pyplot, so there is nothing to close.
        self._writer.add_figure(tag, figure, step, close=False)

    def _loads(self, inputs: Inputs, step: int) -> None:
        if inputs.observed is None:
            return
        for tower, seen in inputs.observed.routing.items():
            counts = np.bincount(seen.group, minlength=inputs.observed.adapter.config.k)
            for group, share in enumerate(counts / counts.sum()):
                self._writer.add_scalar(f"calibration_load{_under(tower)}/group_{group}", share, step)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._draws = None, False


def _under(tower: str) -> str:
    return f"/{tower}" if tower else ""
