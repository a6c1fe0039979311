"""Things made once, kept on disk, and made by one process only when several want them."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def cached(path: Path, make: Callable[[], Any]) -> Any:
    """Load what `make` returned when it was first called for this path: tensors, and containers of plain values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_suffix(".part")
            torch.save(make(), unfinished)
            unfinished.replace(path)
    return torch.load(path, weights_only=True)
