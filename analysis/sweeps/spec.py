"""Sweeps that are written down in a file."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

KEYS = ("objective", "grid", "seeds", "out", "backend", "jobs", "address", "check")
NEEDED = ("objective", "grid")


def read_spec(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file that describes a sweep.

    Returns
    -------
    dict
        The keys of `KEYS` that the file has.

    Raises
    ------
    ValueError
        If the file cannot be read as such, names a thing twice, has unknown keys or lacks the objective or the grid.
    OSError
        If there is no such file.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"a sweep is described in a .yaml or .json file, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content = path.read_text(encoding="utf-8")
        found = json.loads(content, object_pairs_hook=_once) if path.suffix == ".json" else _read_yaml(content)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no mapping with {', '.join(NEEDED)}")
    unknown = [str(key) for key in found if key not in KEYS]
    if unknown:
        raise ValueError(f"{path} has unknown keys {', '.join(unknown)}; the keys are {', '.join(KEYS)}")
    lacking = [key for key in NEEDED if found.get(key) is None]
    if lacking:
        raise ValueError(f"{path} does not say {', '.join(lacking)}")
    wrong = [key for key in ("objective", "out", "backend", "address", "check") if not _text_or_none(found.get(key))]
    if wrong:
        raise ValueError(f"{wrong[0]} of {path} is a text, got {found[wrong[0]]!r}")
    return {key: value for key, value in found.items() if value is not None}


def objective_of(name: str) -> Any:
    """The path of a script as it is, and the function of "module:function".

    Raises
    ------
    ValueError
        If it is neither.
    """
    if Path(name).is_file() or ":" not in name:
        return name
    return function_of(name)


def function_of(name: str) -> Any:
    """The function of "module:function", the module also from the current directory.

    Raises
    ------
    ValueError
        If there is none.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        raise ValueError(f"a function is written module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no {name}: {error}") from error
    return found


def _text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping of pairs whose keys differ."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} occurs twice")
        found[key] = value
    return found


def _read_yaml(content: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain values only; a key that occurs twice is an error, and 1e-3 a number as in JSON."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            try:
                _once([(key, None) for key in keys])
            except TypeError as error:
                raise ValueError(f"a key is no text: {error}") from error
            return super().construct_mapping(node, deep)

    number = re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        return yaml.load(content, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
