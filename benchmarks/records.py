"""Measurements in a JSON file: one record for each thing measured, replaced when it is measured again."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from tucka.files import write_atomically

KEY = ("what", "model", "arm", "settings", "dtype", "device")
"""The fields that tell one record from another."""


class Records:
    """A JSON list of records.

    Parameters
    ----------
    path : str or Path
        The file; it is made with the first record.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()

    def read(self) -> list[dict[str, Any]]:
        """All records.

        Raises
        ------
        ValueError
            If the file is no JSON list of records, each with the fields of `KEY`.
        """
        if not self.path.exists():
            return []
        try:
            found = json.loads(self.path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} is no list of records: {error}") from error
        if not isinstance(found, list) or not all(isinstance(one, dict) and set(KEY) <= set(one) for one in found):
            raise ValueError(f"{self.path} is no list of records that each have {', '.join(KEY)}")
        return found

    def put(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records, in place of those with their keys, in one file that is whole or the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            by_key = {key_of(record): dict(record) for record in self.read()}
            by_key |= {key_of(record): dict(record) for record in records}
            lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in by_key.values())
            write_atomically(self.path, lambda temporary: temporary.write_text(f"[\n{lines}\n]\n"))


def key_of(record: Mapping[str, Any]) -> str:
    """What tells a record from others, as text."""
    return json.dumps([record[name] for name in KEY], sort_keys=True)


def circumstances(command: str) -> dict[str, Any]:
    """Machine, versions, time and command of a measurement that starts now."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "tucka")}
    return {
        "machine": machine(),
        "versions": {"python": platform.python_version(), **packages},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def machine() -> dict[str, Any]:
    """Processor, cores, threads in use, processes that wait for a core, and the accelerator."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    load = round(os.getloadavg()[0], 2) if sys.platform != "win32" else None
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load,
        "gpu": gpu,
    }


def processor() -> str:
    """The name the processor gives itself."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
