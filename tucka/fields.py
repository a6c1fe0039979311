"""What a configuration file may hold: one JSON object of this method, its fields flat and of the right types."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
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
    for names, fits, rule in RULES:
        for name in names:
            value = getattr(config, name)
            if value is not None and not fits(value):
                raise ValueError(f"{name}={shown(value)} is not {rule}")


def shown(value: Any, most: int = 200) -> str:
    """A value as an error shows it: not longer than that many characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset, range)) and len(value) <= MOST_NAMES


def _are_names(value: Any) -> bool:
    return _is_list(value) and all(isinstance(name, str) and name for name in value)


def _are_few_names(value: Any) -> bool:
    return _are_names(value) and len(value) <= MOST_EXPRESSIONS


def _are_ranks(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= MOST_RANKS and _are_names(list(value))


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_flat(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and (held is None or isinstance(held, (str, int, float))) for key, held in value.items()
    )


RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("base_model_name_or_path", "revision", "peft_version"), _is_text, "a text"),
    (("router_module",), lambda value: isinstance(value, str), "a layer name"),
    (
        ("target_modules", "exclude_modules"),
        lambda value: isinstance(value, str) or _are_names(value),
        f"one expression, or at most {MOST_NAMES} names",
    ),
    (
        ("layers_pattern",),
        lambda value: isinstance(value, str) or _are_few_names(value),
        f"an expression, or a list of at most {MOST_EXPRESSIONS}",
    ),
    (("modules_to_save",), _are_few_names, f"a list of at most {MOST_EXPRESSIONS} names"),
    (
        ("layers_to_transform",),
        lambda value: _is_index(value) or (_is_list(value) and all(map(_is_index, value))),
        f"an index, or a list of at most {MOST_NAMES}",
    ),
    (("rank_pattern",), _are_ranks, f"a dictionary {{pattern: r}} of at most {MOST_RANKS} patterns"),
    (("factor_owners", "auto_mapping"), _is_flat, "a flat dictionary"),
    (("inference_mode",), lambda value: isinstance(value, bool), "True or False"),
)
"""Fields, what they may hold beside None, and how an error puts it."""
