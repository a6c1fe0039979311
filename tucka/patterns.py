"""The regular expressions of a configuration: that they are some, and that matching them comes to an end.

PEFT matches names of modules by Python's `re`, which backtracks: an expression such as ``(a+)+!`` can take longer than
anybody waits, and `re` has no time limit. Expressions that could are therefore tried first, on the names they are meant
for, in a process that has one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

from .fields import shown

if TYPE_CHECKING:
    from .config import TuckAConfig

SECONDS = 5.0
"""How long all expressions of a configuration may take on all names of a model."""

STEPS = 1e8
"""Steps of backtracking below which nothing is tried: about a second."""

LONGEST = 100_000
"""Characters of an expression."""

TRIAL = """
import json, re, sys
expressions, names = json.load(sys.stdin)
for how, text in expressions:
    match = getattr(re.compile(text), how)
    for name in names:
        match(name)
"""


class Expression(NamedTuple):
    """A regular expression as PEFT puts it together."""

    field: str
    given: str  # as it stands in the configuration
    text: str
    how: str = "match"


def expressions(config: TuckAConfig) -> Iterator[Expression]:
    """Every regular expression that PEFT will match because of a configuration."""
    for field in ("target_modules", "exclude_modules"):
        value = getattr(config, field)
        if isinstance(value, str):
            yield Expression(field, value, value, "fullmatch")
    for given in config.rank_pattern or ():
        yield Expression("rank_pattern", given, rf"(.*\.)?({given})$")
    for given in config.modules_to_save or ():
        yield Expression("modules_to_save", given, rf"(^|.*\.){given}($|\..*)")
    layers = config.layers_pattern or ()
    for given in [layers] if isinstance(layers, str) else layers:
        yield Expression("layers_pattern", given, rf"(?:^|.*?\.){given}\.(?P<idx>\d+)\.")


def check_expressions(config: TuckAConfig) -> None:
    """Raise `ValueError` for what is no regular expression, or a very long one."""
    for found in expressions(config):
        if len(found.given) > LONGEST:
            raise ValueError(f"{found.field} has {len(found.given)} characters; an expression has at most {LONGEST}")
        try:
            re.compile(found.text)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{found.field}={shown(found.given)} is no regular expression: {error}") from error


def require_quick_matching(config: TuckAConfig, names: Collection[str], only: str | None = None) -> None:
    """Refuse expressions that take too long on these names.

    Parameters
    ----------
    config : TuckAConfig
        Whose expressions.
    names : collection of str
        Names of modules.
    only : str, optional
        The one field whose expressions are meant.

    Raises
    ------
    ValueError
        If matching takes longer than `SECONDS`, or cannot be tried; the message names the longest expression.
    """
    longest = max(map(len, names), default=0)
    costs = {each: steps(each.text, longest) * len(names) for each in expressions(config) if only in (None, each.field)}
    if sum(costs.values()) <= STEPS:
        return
    slow = [each for each, cost in costs.items() if cost > STEPS / len(costs)]
    tried = json.dumps([[(each.how, each.text) for each in slow], list(names)])
    try:
        # Isolated, and with an interpreter's own modules alone: what is tried is hostile until it has ended.
        command = [sys.executable, "-I", "-S", "-c", TRIAL]
        subprocess.run(command, input=tried.encode(), capture_output=True, timeout=SECONDS, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        worst = max(slow, key=lambda each: costs[each])
        raise ValueError(
            f"{worst.field}={shown(worst.given)} cannot be matched with {len(names)} names of modules within "
            f"{SECONDS:g} s; repeat no group that repeats something, and say names where they are known"
        ) from error


def steps(text: str, length: int) -> float:
    """Steps that matching may take on a name of that length, at most; infinite where no bound is known."""
    if re.search(r"\)[*+{]|\\[1-9]|\(\?P=", text):  # a repeated group, or a reference back
        return float("inf")
    repeats, choices = len(re.findall(r"[*+{]", text)), len(re.findall(r"\||(?<![*+?}(])\?", text))
    return float(length + 1) ** min(repeats, 30) * 2.0 ** min(choices, 300)


def rank_lookup(config: TuckAConfig) -> Callable[[str], int]:
    """The rank of a layer by its name, as in PEFT's LoRA: that of the first pattern that matches. Compiled once."""
    ranks = config.rank_pattern or {}
    compiled = [(re.compile(rf"(.*\.)?({pattern})$"), rank) for pattern, rank in ranks.items()]

    def rank_of(name: str) -> int:
        matching = (rank for pattern, rank in compiled if pattern.match(name))
        return next(matching, ranks.get(name, config.r))

    return rank_of
