"""Check of files: what is saved is what is loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from ..scope import replaced
from .comparison import main_output, relative
from .parameters import listed
from .report import FAIL, Row, judged, skipped
from .subject import Subject

COPY = "doctors_copy"
"""Name that the reloaded adapter bears for a moment."""


def save_and_reload(subject: Subject) -> Row:
    """The adapter, saved and loaded beside itself, has the same tensors bit for bit and gives the same outputs."""
    if not isinstance(subject.model, PeftModel):
        return skipped("only a PeftModel saves adapters alone")
    with tempfile.TemporaryDirectory(prefix="tucka-doctor-") as directory:
        folder = _save(subject, directory)
        file = load_peft_weights(str(folder), device="cpu")
        changed = _unequal(file, _state(subject, subject.adapter_name))
        if changed:
            return _broken_file(changed, len(file))
        if subject.config.bias != "none":
            return skipped("the file equals the model; PEFT loads no second adapter beside trained biases")
        return _reload(subject, folder, file)


def _broken_file(changed: list[str], total: int) -> Row:
    return Row(
        FAIL,
        f"{listed(changed)} of the saved file ({len(changed)} of {total} tensors) are not what the model holds.",
        "Save with model.save_pretrained(directory) on a disk with room, from one process; look for code that changes "
        "the state dict while it is saved.",
    )


def _reload(subject: Subject, folder: Path, file: dict[str, Tensor]) -> Row:
    """Judge what the file becomes when it is loaded."""
    with torch.no_grad():
        expected, again = main_output(subject.run()), main_output(subject.run())
        with _loaded(subject, folder):
            changed = _unequal(_state(subject, COPY), file)
            found = main_output(subject.run())
    if changed:
        return Row(
            FAIL,
            f"{listed(changed)} ({len(changed)} of {len(file)} tensors) are loaded as something else than the file "
            "says.",
            "Load with PeftModel.from_pretrained(base, directory) onto the same base model, in the precision it was "
            "saved in (autocast_adapter_dtype).",
        )
    measured = relative(found, expected)
    return judged(
        measured,
        relative(again, expected),
        f"The reloaded adapter has the same tensors, but its outputs differ by {measured:.2g}.",
        "Something that shapes outputs is not saved: compare the configuration in adapter_config.json with "
        "model.peft_config, and whether alpha or other settings of layers were changed by hand.",
        note=f"{len(file)} tensors, bit for bit",
    )


def _save(subject: Subject, directory: str) -> Path:
    """Save the adapter as a user does; its configuration stays as it is in the model."""
    model, name = subject.model, subject.adapter_name
    config = model.peft_config[name]  # type: ignore[index, union-attr]
    kept = {key: vars(config)[key] for key in ("base_model_name_or_path", "inference_mode")}
    with replaced(config, **kept):  # saving writes into them, and leaves them so if it fails
        # With "auto", PEFT may ask the hub for the vocabulary.
        model.save_pretrained(directory, selected_adapters=[name], save_embedding_layers=False)  # type: ignore[operator]
    return Path(directory) / ("" if name == "default" else name)


@contextmanager
def _loaded(subject: Subject, folder: Path) -> Iterator[None]:
    """Load the file as a second adapter, let it act, and take it out again."""
    model: PeftModel = subject.model  # type: ignore[assignment]
    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    with ExitStack() as stack:
        for holder in (model, model.base_model):
            stack.enter_context(replaced(holder, active_adapter=holder.active_adapter))
        for layer in layers:
            stack.enter_context(replaced(layer, _active_adapter=list(layer.active_adapters)))
        try:
            model.load_adapter(folder, COPY, torch_device=str(next(model.parameters()).device))
            for layer in layers:
                layer._active_adapter = [COPY]
            yield
        finally:
            for layer in layers:
                layer._active_adapter = [subject.adapter_name]
            if COPY in model.peft_config:
                model.delete_adapter(COPY)


def _state(subject: Subject, name: str) -> dict[str, Tensor]:
    return get_peft_model_state_dict(subject.model, adapter_name=name, save_embedding_layers=False)  # type: ignore


def _unequal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Keys of one alone, and of tensors that differ in type or in a bit."""
    keys = sorted(found.keys() | expected.keys())
    return [key for key in keys if not _same(found.get(key), expected.get(key))]


def _same(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None or found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    # As bytes, so that NaN equals itself.
    return torch.equal(_bytes(found), _bytes(expected))


def _bytes(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
