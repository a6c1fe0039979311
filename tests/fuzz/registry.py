"""The mutations by name, and words that hostile files are made of."""

import math
from collections.abc import Callable
from random import Random

from .directories import Directory

Mutation = Callable[[Directory, Random], Directory]
MUTATIONS: dict[str, Mutation] = {}


def mutation(function: Mutation) -> Mutation:
    """Put a function among the mutations."""
    MUTATIONS[function.__name__] = function
    return function


HUGE = (2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**9, 10**18, 10**400, -1, -(2**63))
SIZES = (0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 64, 1000, 65_537, 10**6, 10**7, *HUGE)
NUMBERS = (*SIZES, 0.5, 2.0, -0.0, 1e308, 1e400, -1e400, math.nan, True, False)

PATHS = ("../", "../../outside", "/", "/tmp/outside", "..\\..\\outside", "./", "a/b", "a\x00/b", "\n", "%2e%2e%2f")
TEXTS = (
    "", " ", "0", "query", "QUERY", "all-linear", "none", "null", "\x00", "a\x00b", "ｑuery", "é" * 40, "\ud800", "💥",
    "../../../etc/passwd", "/etc/passwd", "..", ".", "/", "C:\\Windows", "~/.ssh/id_rsa", "http://localhost:1/x",
    "__class__", "__init__.__globals__", "{0.__class__}", "%s%n", "${HOME}", "$(touch executed)", "x" * 5000,
    "os.system", "layer", "layer.0", "classifier", "pooler", "default", "base_layer", "core", "layer.",
)  # fmt: skip

BOMBS = (
    "(a+)+$", "(.*)*x", "(.*)*", "([a-z.]+)*!", "(e|e)*!", "((.*)*)*!", "(.*a){20}", "(\\w*\\w*)*\\d", ".*" * 8 + "!",
    "(?:[a-z.0-9]*)*!", "^(([a-z])+.)+[A-Z]([a-z])+$", "(layer|(.+)+)\\1!", "(?=(.*)*)!", "(?i:(.+)+)!",
    r"(?:\w|.|[^x]|[^y]|\S)*!", r"(?:(?:.|\S)(?:.|\S)?)*(?:.|\S)*!", "(?:" * 500 + "a" + ")*" * 500,
    "a?" * 3000 + "a" * 3000, "|".join(f"x{i}" for i in range(5000)),
)  # fmt: skip
"""Regular expressions that take long, or for ever."""

EXPRESSIONS = (
    "(a", ")", "[", "*", "a{99999999999}", "(?P<x>.)(?P=x)", "\\", "(" * 3000 + ")" * 3000, ".*", ".+", "(?s:.)*",
    "(?<!a)b", ".*layer.*query", ".*\\.(query|value)", "$", "",
)  # fmt: skip
"""Others, some of which are none."""
