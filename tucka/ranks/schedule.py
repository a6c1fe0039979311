"""A callback of the transformers Trainer that lowers ranks until a budget holds.

Kept out of ``import tucka``: ``from tucka.ranks.schedule import RankSchedule``.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..model import single_adapter_name
from .families import adapter_parameters, families_of, router_parameters
from .truncation import Truncation, truncate


class RankSchedule(TrainerCallback, ExportableState):
    """Lower the ranks of an adapter between two steps of a training, until its parameters keep a budget.

    After step s the adapter may have b + (n − b) (1 − (s − start) / (end − start))³ parameters, with n what it had when
    training began and b the budget: the cubic schedule of AdaLoRA (Zhang et al. 2023, arXiv 2303.10512, eq. 13), which
    lowers much while little is learnt and little when much is. Each lowering is a `tucka.truncate`, so the experts as
    they are then decide which layer gives up ranks.

    The optimiser goes on with the parameters, and what it remembers is carried over: the first moments of cores and
    expert factors exactly, by the matrices that parameters are multiplied by, and those of D-mode factors up to what
    came through dropped columns; second moments as if entries varied independently, since a change of basis mixes
    them. Norms of ``normalize="bounded"`` enter as factors, without their own derivative. Counts of steps stay.

    A checkpoint of the Trainer notes n: a run that resumes from it with the model loaded from it
    (``PeftModel.from_pretrained(base, checkpoint, is_trainable=True)``) goes on as one that was never interrupted.

    Parameters
    ----------
    budget : int
        Trainable parameters of the adapter at the end (`tucka.ranks.adapter_parameters`).
    end : int
        The step after which the budget holds.
    start : int
        The step at which lowering begins.
    every : int
        Lower after every so many steps.
    adapter_name : str, optional
        Default: the adapter active when training begins.

    Attributes
    ----------
    reports : list of (int, Truncation)
        The step and the report of every lowering that changed a rank.
    first : int
        n, the adapter's parameters when training began.

    Raises
    ------
    ValueError
        If an argument is out of range; when training begins, if the budget is below rank 1 everywhere, the run is
        distributed, or the adapter has ``normalize=True``, under which shapes cannot change without changing it.
    """

    def __init__(
        self, budget: int, *, end: int, start: int = 0, every: int = 50, adapter_name: str | None = None
    ) -> None:
        for name, value, least in (
            ("budget", budget, 1),
            ("start", start, 0),
            ("end", end, start + 1),
            ("every", every, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} is not a whole number of at least {least}")
        self.budget, self.start, self.end, self.every = budget, start, end, every
        self.adapter_name = adapter_name
        self.reports: list[tuple[int, Truncation]] = []
        self.first = 0
        self._name = ""

    def allowed(self, step: int) -> int:
        """Parameters that the adapter may have after a step."""
        part = min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)
        return max(self.budget, int(self.budget + (self.first - self.budget) * (1 - part) ** 3))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, in transformers' form."""
        names = ("budget", "end", "start", "every", "adapter_name")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {"first": self.first}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check what can be checked before the first step."""
        self.reports = []
        self._name = single_adapter_name(model, self.adapter_name)
        families, fixed = families_of(model, self._name), router_parameters(model, self._name)
        least = fixed + sum(family.parameters(1) for family in families)
        noted = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self.first = noted["attributes"]["first"] if noted else adapter_parameters(model, self._name)
        if self.budget < least:
            raise ValueError(f"budget={self.budget} parameters are too few: with rank 1 in every layer it has {least}")
        if model.peft_config[self._name].normalize is True:
            raise ValueError("normalize=True cannot keep its function at other ranks; use 'bounded' or False")
        if args is not None and args.world_size > 1:
            raise ValueError(
                f"ranks cannot be lowered in a run of {args.world_size} processes; use tucka.truncate after"
            )

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Lower ranks when it is time to."""
        step = state.global_step
        if step != self.end and (not self.start < step < self.end or (step - self.start) % self.every):
            return
        # Gradients of this step have been used; the Trainer clears them next.
        if adapter_parameters(model, self._name) > self.allowed(step):
            report = truncate(model, budget=self.allowed(step), adapter_name=self._name, optimizer=optimizer)
            self.reports.append((step, report))
