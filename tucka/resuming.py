"""The checkpoint to resume a training from, where the last one may have been cut off."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path

from .state import header_shapes

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
"""What the Trainer writes last into a checkpoint."""

ARCHIVES = (".pt", ".pth", ".bin")
"""Ends of the files that `torch.save` writes, which are zip archives."""


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The last whole checkpoint that a transformers Trainer wrote.

    A Trainer that is killed while it saves leaves a directory that `transformers.trainer_utils.get_last_checkpoint`
    takes for a checkpoint. This looks into the files, and passes over (and logs) a checkpoint that is not whole::

        trainer.train(resume_from_checkpoint=tucka.last_checkpoint(trainer.args.output_dir))

    Parameters
    ----------
    output_dir : str or Path
        The Trainer's ``output_dir``.

    Returns
    -------
    str or None
        The checkpoint's directory; None, with which the Trainer starts anew, if there is no whole one.

    Notes
    -----
    Whole means: every file can be read to its end, and the Trainer's state, which it writes last, is there. Weights
    are checked by their size, not value by value. In a distributed run the last files of other processes than the
    first are not waited for: one that is missing, not cut off, is not noticed.
    """
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*")}
    steps = {path: int(match[1]) for path, match in found.items() if match and path.is_dir()}
    for path in sorted(steps, key=lambda path: steps[path], reverse=True):
        fault = _fault_of(path)
        if fault is None:
            return str(path)
        logger.warning("%s is not whole and passed over: %s", path, fault)
    return None


def _fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not (checkpoint / TRAINER_STATE).exists():
        return f"it has no {TRAINER_STATE}, which is written last"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    if not any(map(_holds_weights, files)):
        return "it has no weights"
    return next((fault for fault in map(_fault_of_file, files) if fault is not None), None)


def _holds_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".distcp") or (path.suffix in ARCHIVES and "model" in path.name)


def _fault_of_file(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            header_shapes(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in ARCHIVES:
            zipfile.ZipFile(path).close()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        return f"{path.name} cannot be read: {error}"
    return None
