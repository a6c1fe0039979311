"""Names that select given layers and no other, by PEFT's rule: a module is a target if its name is one, or ends so."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper

from ..layer import TuckALayer


def base_module_names(model: PeftModel) -> list[str]:
    """Names of all modules of the base model, as they were before anything was adapted or wrapped."""
    names: list[str] = []
    inside: tuple[str, ...] = ()
    for name, module in model.get_base_model().named_modules():
        if not name or name.startswith(inside):
            continue
        names.append(name)
        if isinstance(module, (TuckALayer, AuxiliaryTrainingWrapper)):
            inside += (f"{name}.",)
    return names


def exact_targets(layers: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """`target_modules` that selects those layers among the modules, and nothing else.

    The last parts of the names where they suffice, else whole names, else a regular expression.
    """
    wanted = set(layers)
    others = set(modules) - wanted
    for targets in (sorted({name.rpartition(".")[2] for name in wanted}), sorted(wanted)):
        ends = tuple(f".{target}" for target in targets)
        if not any(name in targets or name.endswith(ends) for name in others):
            return targets
    return "|".join(re.escape(name) for name in sorted(wanted))
