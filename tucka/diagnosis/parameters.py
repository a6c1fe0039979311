"""Checks of the adapter's tensors as they lie there: finite, precise enough, the right ones trained."""

from __future__ import annotations

import torch
from peft import get_peft_model_state_dict

from .report import FAIL, PASS, WARN, Row, skipped
from .subject import Subject

HALF = (torch.float16, torch.bfloat16)


def finite_numbers(subject: Subject) -> Row:
    """Every number the adapter holds is finite."""
    tensors = {key: value for key, value in subject.own.items() if value.is_floating_point()}
    broken = [key for key, value in tensors.items() if not bool(value.isfinite().all())]
    if not broken:
        return Row(PASS, f"{len(tensors)} tensors")
    return Row(
        FAIL,
        f"{listed(broken)} of the adapter hold NaN or infinity.",
        "Load the last adapter that was sound and train on with a lower learning rate or clipped gradients "
        "(max_grad_norm); normalize='bounded' keeps updates from growing without limit.",
    )


def precision(subject: Subject) -> Row:
    """The adapter is held in single precision at least."""
    coarse = [key for key, value in subject.own.items() if value.dtype in HALF]
    if not coarse:
        return Row(PASS)
    return Row(
        WARN,
        f"{listed(coarse)} of the adapter are {subject.own[coarse[0]].dtype}: steps of the optimiser smaller than the "
        "rounding are lost, and routes near a tie flip.",
        "Leave autocast_adapter_dtype=True (the default) when wrapping or loading, and do not call .half() or "
        ".bfloat16() on the wrapped model; the base model may stay in half precision.",
    )


def what_trains(subject: Subject) -> Row:
    """The adapter trains, and nothing trains that is not saved with it."""
    saved = get_peft_model_state_dict(  # type: ignore[no-untyped-call]
        subject.model, adapter_name=subject.adapter_name, save_embedding_layers=False
    )
    kept = {value.data_ptr() for value in saved.values()}
    stray = [key for key, value in subject.trained.items() if value.data_ptr() not in kept]
    if stray:
        return Row(
            FAIL,
            f"Trained, but not saved with the adapter: {listed(stray)}. A reloaded model lacks what they learn.",
            "Freeze them (parameter.requires_grad_(False)), or name their module in modules_to_save before wrapping.",
        )
    if subject.inference:
        return skipped("nothing trains: loaded for inference (is_trainable=True to train on)")
    return Row(PASS, f"{sum(value.numel() for value in subject.trained.values()):,} parameters, all of them saved")


def router_started(subject: Subject) -> Row:
    """The centroids have seen data."""
    waiting = [tower or "the model" for tower, found in _routers(subject).items() if found.awaits_start]
    if not waiting:
        return Row(PASS)
    return Row(
        WARN,
        f"The router of {', '.join(waiting)} has seen no data: its centroids are random until the first training "
        "batch, one batch then places them all, and until then routes mean nothing.",
        "Give tucka.apply(…, calibration=loader), or call tucka.initialize(model, loader) before training.",
    )


def _routers(subject: Subject) -> dict:
    return {tower: found.router(subject.adapter_name) for tower, found in subject.dispatchers.items()}


def listed(names: list[str], shown: int = 2) -> str:
    """A few names, shortened to what tells them apart, and how many more there are."""
    short = [name.removeprefix("base_model.model.") for name in names[:shown]]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(short) + more
