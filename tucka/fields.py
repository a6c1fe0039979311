"""What a configuration file may hold: one JSON object of this method, its fields flat and of the right types."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .registration import PEFT_TYPE

if TYPE_CHECKING:
    from .config import TuckAConfig

LARGEST = 32 << 20
"""Bytes of a configuration file: room for the names of a hundred thousand layers."""

MOST_NAMES = 20_000
"""Names in one field. PEFT compares each of them with each module of the model."""

MOST_RANKS = 4096
"""Patterns in `rank_pattern`, each of which is compiled."""

MOST_EXPRESSIONS = 256
"""Names in a field that PEFT takes for regular expressions; Python keeps that many compiled."""

TEXTS = ("base_model_name_or_path", "revision", "peft_version")
NAMES = ("target_modules", "exclude_modules")


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a configuration file of this method.

    Raises
    ------
    ValueError
        If it is too large, no JSON object in UTF-8, or configures another method; the message names the file.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path} has {size} bytes, but a configuration has at most {LARGEST}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, but a configuration is an object")
    if content.get("peft_type") != PEFT_TYPE:
        method = shown(content.get("peft_type"))
        raise ValueError(f"{path} configures an adapter of type {method}, not {PEFT_TYPE!r}")
    reserved = content.keys() & {"self", "cls"}
    if reserved:
        raise ValueError(f"{path} holds a field {reserved.pop()!r}, which no configuration has")
    return content


def check_fields(config: TuckAConfig) -> None:
    """Raise `ValueError` for a field of the wrong type, naming the field, the value and the rule."""
    for name in TEXTS:
        value = getattr(config, name)
        _require(value is None or isinstance(value, (str, os.PathLike)), name, value, "a text")
    router = config.router_module
    _require(router is None or isinstance(router, str), "router_module", router, "a layer name")
    for name in NAMES:
        value = getattr(config, name)
        _require(value is None or isinstance(value, str) or _are_names(value), name, value, "names, or one expression")
    saved, pattern, ranks = config.modules_to_save, config.layers_pattern, config.rank_pattern
    layers: Any = config.layers_to_transform
    _require(saved is None or _are_names(saved, MOST_EXPRESSIONS), "modules_to_save", saved, "a list of names")
    _require(
        pattern is None or isinstance(pattern, str) or _are_names(pattern, MOST_EXPRESSIONS),
        "layers_pattern", pattern, "an expression, or a list of them",
    )  # fmt: skip
    _require(
        layers is None or _is_index(layers) or (_is_list(layers) and all(map(_is_index, layers))),
        "layers_to_transform", layers, "an index, or a list of them",
    )  # fmt: skip
    _require(
        ranks is None or (isinstance(ranks, dict) and _are_names(list(ranks), MOST_RANKS)),
        "rank_pattern", ranks, f"a dictionary {{pattern: r}} of at most {MOST_RANKS} patterns",
    )  # fmt: skip
    for name in ("factor_owners", "auto_mapping"):
        value = getattr(config, name)
        _require(value is None or _is_flat(value), name, value, "a flat dictionary")
    _require(isinstance(config.inference_mode, bool), "inference_mode", config.inference_mode, "True or False")


def shown(value: Any, most: int = 200) -> str:
    """A value as an error shows it: not longer than that many characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def _require(fits: bool, name: str, value: Any, rule: str) -> None:
    if not fits:
        raise ValueError(f"{name}={shown(value)} is not {rule}")


def _are_names(value: Any, most: int = MOST_NAMES) -> bool:
    return _is_list(value) and len(value) <= most and all(isinstance(name, str) and name for name in value)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and len(value) <= MOST_NAMES


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_flat(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and (held is None or isinstance(held, (str, int, float))) for key, held in value.items()
    )
