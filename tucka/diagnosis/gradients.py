"""Checks of gradients: they arrive, and checkpointing does not change them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from transformers import PreTrainedModel

from .comparison import largest, main_output, tolerance_of
from .parameters import listed
from .report import FAIL, PASS, WARN, Row, judged, skipped
from .start import cores_are_zero
from .subject import Subject, checkpointing, is_own

FLOOR = 1e-3
"""Gradients smaller than this part of the largest are compared as if they were of that size."""

Gradients = dict[str, Optional[Tensor]]


def gradients_arrive(subject: Subject) -> Row:
    """Every trained parameter receives a finite gradient that can move it."""
    found = gradients_of(subject)
    broken = [name for name, value in found.items() if value is not None and not bool(value.isfinite().all())]
    if broken:
        return Row(
            FAIL,
            f"The gradient of {listed(broken)} holds NaN or infinity.",
            "If 'forward and routes' passes, the loss overflows in backward: train in bfloat16 or float32, or scale "
            "the loss.",
        )
    missing = [name for name, value in found.items() if value is None]
    if missing:
        return Row(
            FAIL if len(missing) == len(found) else WARN,
            f"The loss of this batch does not depend on {listed(missing)}: {len(missing)} of {len(found)} parameters "
            "would not train, and distributed training stops at parameters without a gradient.",
            "Leave their layers out (exclude_modules), or give a batch that uses them; a layer that reads what all "
            "samples share (relative positions) needs shared_expert=True.",
        )
    return _unmoved(subject, {name for name, value in found.items() if value is not None and not bool(value.any())})


def _unmoved(subject: Subject, zero: set[str]) -> Row:
    """Judge gradients that are there and zero."""
    config = subject.config
    if config.affinity == "paper" and config.t == 1:
        return Row(
            WARN,
            "With affinity='paper' and t=1 a gate is the sign of a logit: the router gets no gradient and stays where "
            "it started.",
            "Use t=2 or more, or affinity='cosine'; or start it well (init_router='kmeans') and leave it there.",
        )
    if config.normalize:  # a single number divided by its norm is a constant
        zero = {name for name in zero if subject.trained[name].numel() > 1}
    if cores_are_zero(subject):
        zero = {name for name in zero if name.endswith("core") or not is_own(name)}
    elif config.k * config.t == 1:
        zero = {name for name in zero if ".tucka_router." not in name}  # one expert's gate is a constant
    if zero:
        return Row(
            WARN,
            f"The gradient of {listed(sorted(zero))} is exactly zero on this batch.",
            "Try another batch. If it stays zero, something behind these layers is cut off or constant.",
        )
    start = "the cores are zero: the rest is moved from the second step on" if cores_are_zero(subject) else ""
    return Row(PASS, start)


def checkpointed(subject: Subject) -> Row:
    """Recomputed blocks give the gradients of plain backward (variant without reentrance)."""
    return _checkpointed(
        subject,
        use_reentrant=False,
        remedy="A recomputed block read another route than its forward's: checkpoint through the model's own "
        "gradient_checkpointing_enable(), not by wrapping its blocks.",
    )


def checkpointed_reentrant(subject: Subject) -> Row:
    """The same in the reentrant variant."""
    # torch has no public way to ask for these hooks.
    if any(parameter._post_accumulate_grad_hooks for parameter in subject.trained.values()):
        return skipped("parameters step as their gradients arrive, and this would be a step")
    return _checkpointed(
        subject,
        use_reentrant=True,
        remedy="Use the other variant: gradient_checkpointing_enable({'use_reentrant': False}); the reentrant one "
        "needs blocks that take their input as a positional argument.",
    )


def _checkpointed(subject: Subject, use_reentrant: bool, remedy: str) -> Row:
    with checkpointing(subject.model, None) as blocks:
        if not blocks:
            return skipped(f"{type(subject.base).__name__} has no blocks that transformers can checkpoint")
        expected = gradients_of(subject)
    try:
        with checkpointing(subject.model, use_reentrant):
            found = gradients_of(subject, through_leaves=use_reentrant)
    except CheckpointError as error:
        return Row(FAIL, f"A block takes another course when it is recomputed: {str(error).splitlines()[0]}", remedy)
    differences = _differences(found, expected)
    worst = max(differences, key=lambda name: (differences[name] != differences[name], differences[name]))
    return judged(
        largest(differences.values()),
        tolerance_of(subject.model),
        f"Of two forwards and their backward, the gradient of {listed([worst])} differs by {differences[worst]:.2g} "
        "from that without checkpointing.",
        remedy,
    )


def _differences(found: Gradients, expected: Gradients) -> dict[str, float]:
    """‖found − expected‖ / ‖expected‖ of every parameter; no gradient counts as zero."""
    norms = {name: 0.0 if value is None else float(value.double().norm()) for name, value in expected.items()}
    floor = FLOOR * largest(norms.values()) or 1.0
    apart = {name: float(_minus(found[name], expected[name])) for name in expected}
    return {name: value / max(norms[name], floor) for name, value in apart.items()}


def _minus(found: Tensor | None, expected: Tensor | None) -> Tensor:
    both = [value.double() for value in (found, expected) if value is not None]
    return (both[0] - both[1] if len(both) == 2 else sum(both, torch.zeros(()))).norm()


# --- taking gradients ------------------------------------------------------------------------------------------------


def gradients_of(subject: Subject, through_leaves: bool = False) -> Gradients:
    """Gradients of the trained parameters, the loss being the sum over two forwards, of each half of the batch.

    So a block that is recomputed has seen another forward pass by. `through_leaves` takes them as an optimiser does,
    from `.grad`, which reentrant checkpoints need; those that were there are put back.
    """
    half = subject.samples // 2
    parts = [subject.part(0, half), subject.part(half, 2 * half)] if half else [subject.batch]
    parameters = list(subject.trained.values())
    for parameter in parameters:
        parameter.requires_grad_(True)  # `examined` holds what it was
    with torch.enable_grad(), _inputs_with_gradient(subject.model, through_leaves):
        loss = torch.stack([_loss(subject.run(part)) for part in parts]).sum()
        if not loss.requires_grad:
            return dict.fromkeys(subject.trained)
        taken = _from_leaves(loss, parameters) if through_leaves else torch.autograd.grad(
            loss, parameters, allow_unused=True
        )  # fmt: skip
    return dict(zip(subject.trained, taken))


def _loss(output: Any) -> Tensor:
    """The model's loss; without labels, the mean square of its output."""
    loss = getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else main_output(output).float().square().mean()


def _from_leaves(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, grad in zip(parameters, before):
            parameter.grad = grad


@contextmanager
def _inputs_with_gradient(model: nn.Module, needed: bool) -> Iterator[None]:
    """Let embeddings give outputs that require gradient, as a reentrant checkpoint of frozen layers needs."""
    handles = [
        module.register_forward_hook(lambda embedding, args, output: output.requires_grad_(True))
        for module in (_embeddings(model) if needed else [])
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """The input embeddings of a model and of every pretrained model inside it, each once."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            try:
                embedding = module.get_input_embeddings()
            except (NotImplementedError, AttributeError):  # transformers' answers of models that have none
                continue
            if isinstance(embedding, nn.Module):
                found[id(embedding)] = embedding
    return list(found.values())
