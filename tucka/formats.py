"""Versions of the configuration file: which this release reads, and how an older one becomes the present one.

A file says its version in ``format_version``; one without it was written by the paper's published code and counts as
version 0. What makes it safe for an earlier release to read a file of a later one is a promise kept by every change:

- A change by which the same file would make another adapter (a new field whose absence means something else, another
  meaning of an old one) raises `FORMAT_VERSION` and adds to `UPGRADES` what older files meant. Earlier releases refuse
  the new files, by an error that names both versions.
- A field that changes nothing an adapter computes needs no new version: earlier releases leave it out, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from .fields import shown

FORMAT_VERSION = 4
"""Version of the files this release writes; files of a later version are refused."""


def _from_published_code(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Version 0: the paper's semantics. Its own names of fields are mapped by `TuckAConfig`, which takes them too."""
    from .config import PAPER

    return {**PAPER, "pool_padding": True, "pool_answers": True}


def _without_axes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Version 1: no slice on the input's axes."""
    return {"axis_block_size": None}


def _with_fixed_gain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Version 2: cores of gain 3, and no bound on the slice on the input's axes."""
    return {"core_gain": 3.0, "axis_bound": None}


def _with_lean_blocks(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Version 3: "auto" had narrow blocks in wide layers with fewer outputs than inputs, as "lean" has now."""
    return {"axis_block_size": "lean"} if fields["axis_block_size"] == "auto" else {}


UPGRADES: dict[int, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    0: _from_published_code, 1: _without_axes, 2: _with_fixed_gain, 3: _with_lean_blocks,
}  # fmt: skip
"""By version: takes the fields of such a configuration, returns those that differ in the next version."""


def require_readable(version: Any) -> None:
    """Refuse a later version, and what is none, by `ValueError`."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 0:
        raise ValueError(f"format_version={shown(version)} is not a whole number of at least 0")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version={shown(version)} is of a later tucka; this one reads up to {FORMAT_VERSION}. "
            "Upgrade tucka to read it"
        )


def upgrade(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What changes in the fields of a configuration on its way to the present version; nothing if it has that."""
    changed: dict[str, Any] = {}
    for version in range(fields["format_version"], FORMAT_VERSION):
        changed |= UPGRADES[version]({**fields, **changed})
        changed["format_version"] = version + 1
    return changed


def known_fields(given: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The fields of a file that this release knows; the others are left out with a warning.

    Raises
    ------
    ValueError
        If the file is of a later version, whose fields may mean anything.
    """
    require_readable(given.get("format_version", 0))
    unknown = sorted(given.keys() - set(known))
    if unknown:
        warnings.warn(
            f"the configuration holds fields that this release does not know: {shown(unknown)}. They are left out: a "
            "field that changes what an adapter computes comes with a later format_version, which is refused.",
            stacklevel=5,  # whoever called `TuckAConfig.from_pretrained`
        )
    return {name: value for name, value in given.items() if name in known}
