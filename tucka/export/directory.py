"""Directories of exports: written whole or not at all, and never over something that is no export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ..files import replace_together

RECORD = "tucka_export.json"
"""Says what an export is of; a directory without it is not replaced."""


def write_export(directory: str | Path, record: dict[str, Any], write: Callable[[Path], Any]) -> Path:
    """Let a function fill an empty folder and put its files in place together, replacing an earlier export.

    Files that no export wrote stay.

    Raises
    ------
    ValueError
        If the directory is a file, or holds an adapter that is no export.
    """
    directory = Path(directory)
    earlier = _earlier_parts(directory)
    existed = directory.exists()

    def fill(folder: Path) -> None:
        write(folder)
        parts = sorted(path.name for path in folder.iterdir())
        (folder / RECORD).write_text(json.dumps({**record, "parts": parts}, indent=2) + "\n")

    try:
        directory.mkdir(parents=True, exist_ok=True)
        replace_together(directory, fill)
    except BaseException:
        if not existed:
            with suppress(OSError):
                directory.rmdir()
        raise
    for part in set(earlier) - set(read_record(directory)["parts"]):  # no reader finds them through the new record
        path = directory / part
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return directory


def read_record(directory: str | Path) -> dict[str, Any]:
    """What an export in a directory says of itself."""
    return json.loads((Path(directory) / RECORD).read_text())


def _earlier_parts(directory: Path) -> list[str]:
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; an export is a directory")
    if (directory / RECORD).is_file():
        return [part for part in read_record(directory).get("parts", []) if Path(part).name == part]
    if (directory / CONFIG_NAME).exists():
        kind = json.loads((directory / CONFIG_NAME).read_text()).get("peft_type")
        raise ValueError(f"{directory} holds an adapter (peft_type {kind}) that is no export; give another directory")
    return []
