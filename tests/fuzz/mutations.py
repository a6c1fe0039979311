"""Ways to make an adapter directory hostile: pure functions from (Directory, random.Random) to a Directory, by name."""

import struct
from random import Random

from . import on_configs, on_files, on_weights  # noqa: F401  (fill the registry)
from .directories import Directory
from .registry import MUTATIONS

RARE = ("large", "patterns", "extra_tensors")
"""Mutations that are slow to load, drawn a third as often as others."""


def mutate(directory: Directory, rng: Random, kind: str | None = None) -> tuple[str, Directory]:
    """Apply a mutation; default: one drawn at random, and sometimes two or three of them."""
    names = sorted(MUTATIONS)
    if kind is None and rng.random() < 0.15:
        return "several", _several(directory, rng, rng.sample(names, rng.randint(2, 3)))
    if kind is None:
        (kind,) = rng.choices(names, [1 if name in RARE else 3 for name in names])
    return kind, MUTATIONS[kind](directory, rng)


def _several(directory: Directory, rng: Random, kinds: list[str]) -> Directory:
    for kind in kinds:
        try:
            directory = MUTATIONS[kind](directory, rng)
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError, IndexError, struct.error):
            continue  # an earlier one left nothing that this one can read
    return directory
