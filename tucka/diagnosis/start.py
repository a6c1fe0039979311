"""Checks against the base model: what an adapter that has learnt nothing, or is switched off, leaves of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor

from ..calibration import bare
from .comparison import largest, main_output, relative
from .parameters import listed
from .report import WARN, Row, judged, skipped
from .subject import Subject


def identity_at_start(subject: Subject) -> Row:
    """With zero cores the outputs are the base model's."""
    zero = {name: not bool(core.any()) for name, core in _cores(subject).items()}
    if not any(zero.values()):
        config = subject.config
        started = config.init_experts == "kaiming" or config.warm_start or not config.init_weights
        return skipped("the start is not the identity" if started else "trained: the cores are not zero")
    if not all(zero.values()):
        idle = [name for name, is_zero in zero.items() if is_zero]
        return Row(
            WARN,
            f"The cores of {listed(idle)} ({len(idle)} of {len(zero)} layers) are zero, those of the others are not: "
            "they have not moved in training, or only some layers were started.",
            "Look at 'gradients arrive'; leave layers that never receive a gradient out (exclude_modules).",
        )
    with torch.no_grad():
        adapted = main_output(subject.run())
        with bare(subject.layers):
            base, again = main_output(subject.run()), main_output(subject.run())
    # What two runs of the base model differ by is nobody's fault.
    noise, measured = _difference(again, base), _difference(adapted, base)
    return judged(
        measured,
        noise,
        f"Every core is zero, yet the outputs differ from the base model's by {measured:.2g}.",
        "NaN or infinity in a factor or a centroid does this (0 · NaN is NaN): see 'finite numbers'; otherwise a layer "
        "adds more than its experts give it.",
        note="the outputs are the base model's",
    )


def cores_are_zero(subject: Subject) -> bool:
    """Whether no layer has any update yet."""
    return not any(bool(core.any()) for core in _cores(subject).values())


def _cores(subject: Subject) -> dict[str, Tensor]:
    """Everything in a layer that its update is a multiple of, by layer name."""
    parts = {
        name: [part for part in (experts.core, experts.shared_core, experts.axis_core) if part is not None]
        for name, experts in subject.experts.items()
    }
    return {name: torch.cat([part.detach().flatten() for part in found]) for name, found in parts.items()}


def disabled_adapter(subject: Subject) -> Row:
    """Switched off, the adapted layers are the base model's own."""
    if not isinstance(subject.model, PeftModel):
        return skipped("only a PeftModel has disable_adapter()")
    if subject.config.bias != "none":
        return Row(
            WARN,
            f"bias={subject.config.bias!r} trains the base model's own biases, and disable_adapter() keeps what they "
            "learnt: the outputs are then not the base model's.",
            "Where the base model itself is needed, load it anew; or use bias='none'.",
        )
    with torch.no_grad(), subject.model.disable_adapter():
        disabled = main_output(subject.run())
        with _taken_out(subject):
            base, again = main_output(subject.run()), main_output(subject.run())
    measured = _difference(disabled, base)
    return judged(
        measured,
        _difference(again, base),
        f"Under disable_adapter() the outputs differ by {measured:.2g} from those with the adapted layers taken out.",
        "A layer that another tool has wrapped or patched may not follow the switch: unwrap it, or compare with "
        "model.unload().",
    )


@contextmanager
def _taken_out(subject: Subject) -> Iterator[None]:
    """Put the base layers in the place of the layers that wrap them."""
    layers = set(subject.layers)
    places = [
        (module, name, child)
        for module in subject.model.modules()
        for name, child in module.named_children()
        if child in layers
    ]
    try:
        for parent, name, layer in places:
            setattr(parent, name, layer.base_layer)
        yield
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)


def _difference(found: Tensor, expected: Tensor) -> float:
    return largest([relative(found, expected)])
