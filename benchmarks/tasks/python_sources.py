"""Labelled texts from what every Python installation has: its library's sources and the Unicode database."""

from __future__ import annotations

import ast
import itertools
import sysconfig
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

LABELS = 8
Pool = dict[str, list[str]]  # texts by label

ROLES = {
    "Assert": "test", "Assign": "value", "AugAssign": "value", "Expr": "value", "For": "iter", "If": "test",
    "Return": "value", "While": "test",
}  # fmt: skip
"""Kinds of statements, and the field that holds the expression which stands in one."""

ORDERS = {
    "kept": lambda words: words,
    "reversed": lambda words: words[::-1],
    "sorted": sorted,
    "halves swapped": lambda words: words[len(words) // 2 :] + words[: len(words) // 2],
    "neighbours swapped": lambda words: [w for i in range(0, len(words), 2) for w in words[i : i + 2][::-1]],
    "first moved last": lambda words: words[1:] + words[:1],
    "odd before even": lambda words: words[1::2] + words[::2],
    "ends swapped": lambda words: words[-1:] + words[1:-1] + words[:1],
}
"""What may be done to the words of a sentence."""

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
ALGORITHMIC = ("CJK", "HANGUL SYLLABLE", "VARIATION", "TANGUT", "NUSHU", "KHITAN", "EGYPTIAN")
"""Beginnings of Unicode names that are numbered, thousands of each."""


def pools() -> dict[str, Pool]:
    """Texts of all tasks, no text twice.

    "docstring": first paragraph of a docstring, and the module it is from. "signature": first line of a definition, and
    its module. "role": an expression, and the kind of statement it stands in. "order": a sentence from a docstring, and
    what was done to its words. "character": name of a character, and its general category.
    """
    trees = list(library())
    own, rest = _largest(by_module(trees, docstrings))
    return {
        "docstring": own,
        "signature": _largest(by_module(trees, signatures))[0],
        "role": roles(trees),
        "order": reordered(itertools.chain.from_iterable(rest.values())),
        "character": _largest(character_names())[0],
    }


def library() -> Iterator[tuple[str, ast.Module]]:
    """Top-level name and syntax tree of every module of the standard library, tests left out, in order of path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if NOT_LIBRARY.isdisjoint(parts[:-1]):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    yield parts[0].removesuffix(".py"), ast.parse(path.read_bytes())
            except SyntaxError:  # templates and samples of other versions
                continue


def by_module(trees: Iterable[tuple[str, ast.Module]], read) -> Pool:
    """The distinct texts that a function reads from each module's trees."""
    seen: set[str] = set()
    pool: Pool = defaultdict(list)
    for module, tree in trees:
        pool[module] += (text for text in read(tree) if _is_new(text, seen))
    return pool


def docstrings(tree: ast.Module) -> Iterator[str]:
    """First paragraphs of at least four words."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            words = (ast.get_docstring(node) or "").partition("\n\n")[0].split()
            if len(words) >= 4:
                yield " ".join(words)


def signatures(tree: ast.Module) -> Iterator[str]:
    """Names and arguments of functions that take at least two."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and len(node.args.args) >= 2:
            yield f"{node.name}({ast.unparse(node.args)})"


def roles(trees: Iterable[tuple[str, ast.Module]]) -> Pool:
    """Distinct expressions of at least eight characters by the kind of statement they stand in."""
    seen: set[str] = set()
    pool: Pool = {kind: [] for kind in ROLES}
    for node in itertools.chain.from_iterable(ast.walk(tree) for _, tree in trees):
        expression = getattr(node, ROLES.get(type(node).__name__, ""), None)
        if isinstance(expression, ast.expr) and not isinstance(expression, (ast.Name, ast.Constant)):
            text = ast.unparse(expression)
            if len(text) >= 8 and _is_new(text, seen):
                pool[type(node).__name__].append(text)
    return pool


def reordered(texts: Iterable[str]) -> Pool:
    """Sentences of seven to twenty words, each in one of the orders in turn."""
    pool: Pool = {order: [] for order in ORDERS}
    turns = itertools.cycle(ORDERS)
    for words in (text.partition(". ")[0].lower().rstrip(".").split() for text in texts):
        if 7 <= len(words) <= 20:
            order = next(turns)
            pool[order].append(" ".join(ORDERS[order](words)))
    return pool


def character_names() -> Pool:
    """Names of characters by general category, numbered ones left out."""
    pool: Pool = defaultdict(list)
    for character in map(chr, range(0x110000)):
        name = unicodedata.name(character, "")
        if name and not name.startswith(ALGORITHMIC):
            pool[unicodedata.category(character)].append(name.lower())
    return pool


def _largest(pool: Pool) -> tuple[Pool, Pool]:
    """The labels with the most texts, and the others."""
    first = [label for label, _ in Counter({label: len(texts) for label, texts in pool.items()}).most_common(LABELS)]
    return {label: pool[label] for label in first}, {k: texts for k, texts in pool.items() if k not in first}


def _is_new(text: str, seen: set[str]) -> bool:
    """Whether a text differs from those seen in more than case; it then counts as seen."""
    known = len(seen)
    seen.add(text.lower())
    return len(seen) > known
