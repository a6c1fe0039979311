"""Saving an adapter so that its directory holds the old one or the new one, whole, whatever happens meanwhile."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn

from .files import LOCK, replace_together

CARD = "README.md"
"""The model card, which PEFT brings up to date where there is one."""


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    selected_adapters: list[str] | None = None,
    state_dict: dict[str, Tensor] | None = None,
    save_embedding_layers: bool | str = "auto",
    is_main_process: bool = True,
) -> Path:
    """Save adapters as `PeftModel.save_pretrained` does, atomically.

    The directory holds the adapter it held before or the new one, whole, also if the process is killed at any moment,
    the disk is full or may not be written to. Other files in it stay. Processes that save to one directory wait for
    each other; what a killed one left behind, the next save clears away.

    Parameters
    ----------
    model : PeftModel
        The adapted model; unwrapped, if it was prepared for distributed training.
    directory : str or Path
        Made if it is missing. ``PeftModel.from_pretrained(base_model, directory)`` reads it. Adapters not called
        "default" lie in directories of their names in it, as PEFT has it.
    selected_adapters : list of str, optional
        Names of the adapters to save; default: all. They are replaced together.
    state_dict : dict, optional
        The model's state, where it had to be gathered first (FSDP, DeepSpeed).
    save_embedding_layers : bool or "auto"
        As in `PeftModel.save_pretrained`.
    is_main_process : bool
        Whether this process writes; in a distributed run every process calls, and one of them writes.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    TypeError
        If `model` is no `PeftModel`.
    OSError
        If something cannot be written; the message names the directory, and what it held is as it was.

    Notes
    -----
    What makes it atomic, and what holds where there are no symbolic links: see `tucka.files.replace_together`.
    Readers need no help: the files are ordinary ones. A reader that opens one file before a save and the next after it
    sees both adapters, as with any writer.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"save takes a PeftModel, but got a {type(model).__name__}; unwrap a model prepared for distributed "
            "training (accelerator.unwrap_model), adapt a bare one (tucka.apply)"
        )
    directory = Path(directory)
    options: dict[str, Any] = dict(selected_adapters=selected_adapters, save_embedding_layers=save_embedding_layers)
    if state_dict is not None:
        options["state_dict"] = state_dict
    if not is_main_process:  # a gathered state may need every process, but the files need one
        model.save_pretrained(str(directory), is_main_process=False, **options)
        return directory

    def write(folder: Path) -> None:
        if (directory / CARD).is_file():
            shutil.copyfile(directory / CARD, folder / CARD)
        with _modes_kept(model):
            model.save_pretrained(str(folder), **options)

    existed = directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        replace_together(directory, write)
    except (OSError, SafetensorError) as error:
        raise _explained(error, directory) from error
    finally:
        if not existed:
            _remove_if_empty(directory)
    return directory


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        if [path.name for path in directory.iterdir()] in ([], [LOCK]):
            shutil.rmtree(directory)


@contextmanager
def _modes_kept(model: PeftModel) -> Iterator[None]:
    """Put `inference_mode` back, which PEFT sets for the file and leaves so if writing it fails."""
    modes = {name: config.inference_mode for name, config in model.peft_config.items()}
    try:
        yield
    finally:
        for name, mode in modes.items():
            model.peft_config[name].inference_mode = mode


def _explained(error: OSError | SafetensorError, directory: Path) -> Exception:
    """A failure of the system with the directory and what has become of it; any other error stays as it is."""
    number = _number_of(error)
    if number is None:
        return error
    what = error.strerror if isinstance(error, OSError) else str(error)
    return OSError(number, f"the adapter was not saved to {directory}, which holds what it held before: {what}")


def _number_of(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error, which safetensors tells in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"os error (\d+)", str(error))
    return int(told[1]) if told else None
