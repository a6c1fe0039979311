"""An adapter directory as data, so that it can be changed before any of it is written.

Safetensors: 8 bytes of header length, a JSON header {key: {dtype, shape, data_offsets}}, the tensors' bytes.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


class Tensor(NamedTuple):
    """One tensor of a file; nothing need fit together."""

    key: str
    dtype: str
    shape: list
    data: bytes


class Directory(NamedTuple):
    """Files by name, and what stands in for a file: {name: (what, detail)}."""

    files: dict
    special: Mapping = MappingProxyType({})

    def with_file(self, name: str, content: bytes) -> "Directory":
        return self._replace(files={**self.files, name: content})

    def without(self, name: str) -> "Directory":
        return self._replace(files={key: value for key, value in self.files.items() if key != name})

    def with_special(self, name: str, what: str, detail: Any = None) -> "Directory":
        return self.without(name)._replace(special={**self.special, name: (what, detail)})

    @property
    def config(self) -> Any:
        return json.loads(self.files[CONFIG])

    def with_config(self, config: Any) -> "Directory":
        return self.with_file(CONFIG, json.dumps(config).encode())

    def with_fields(self, /, **fields: Any) -> "Directory":
        return self.with_config({**self.config, **fields})

    @property
    def tensors(self) -> list:
        return unpack(self.files[WEIGHTS])

    def with_tensors(self, tensors: list) -> "Directory":
        return self.with_file(WEIGHTS, pack(tensors))

    def write(self, path: Path) -> None:
        """Write it into a new directory."""
        path.mkdir()
        for name in self.files.keys() - self.special.keys():
            (path / name).write_bytes(self.files[name])
        for name, (what, detail) in self.special.items():
            SPECIAL[what](path / name, detail)


def _with_hole(path: Path, head_and_size: tuple) -> None:
    head, size = head_and_size
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)


SPECIAL = {
    "directory": lambda path, _: path.mkdir(),
    "fifo": lambda path, _: os.mkfifo(path),
    "link": lambda path, target: path.symlink_to(target),
    "holes": _with_hole,
}


def header_end(weights: bytes) -> int:
    return 8 + int.from_bytes(weights[:8], "little")


def header_of(weights: bytes) -> dict:
    return json.loads(weights[8 : header_end(weights)])


def with_header(weights: bytes, header: Any) -> bytes:
    """The same tensors' bytes under another header, given as an object or as text."""
    text = header if isinstance(header, str) else json.dumps(header)
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + weights[header_end(weights) :]


def unpack(weights: bytes) -> list:
    start = header_end(weights)
    entries = {key: entry for key, entry in header_of(weights).items() if key != "__metadata__"}
    return [
        Tensor(key, entry["dtype"], entry["shape"], weights[start + entry["data_offsets"][0] :][: _length(entry)])
        for key, entry in entries.items()
    ]


def _length(entry: dict) -> int:
    return entry["data_offsets"][1] - entry["data_offsets"][0]


def pack(tensors: list) -> bytes:
    """A file whose offsets fit; keys given twice stand in it twice."""
    entries, offset = ['"__metadata__": {"format": "pt"}'], 0
    for tensor in tensors:
        place = dict(dtype=tensor.dtype, shape=tensor.shape, data_offsets=[offset, offset + len(tensor.data)])
        entries.append(f"{json.dumps(tensor.key)}: {json.dumps(place)}")
        offset += len(tensor.data)
    body = b"".join(tensor.data for tensor in tensors)
    return with_header((0).to_bytes(8, "little") + body, "{" + ", ".join(entries) + "}")
