"""Docstrings of the standard library, and the module or package each is from: a text task that every Python has."""

from __future__ import annotations

import ast
import json
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common.rows import split
from filelock import FileLock
from tqdm import tqdm

from tucka.files import write_atomically

CLASSES, MOST = 32, 140
"""Modules with the most docstrings, and how many of one module are drawn."""

WORDS = 4
"""The fewest that a text has."""

SHARES = (0.25, 0.1)
"""Of the test and of the validation split; the rest is trained on."""

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

Texts = list[tuple[str, int]]


class Docstrings(NamedTuple):
    """Texts with the numbers of their modules, in splits that share no text, and the modules' names."""

    train: Texts
    validation: Texts
    test: Texts
    names: list[str]


def load(seed: int, cache: Path, most: int = MOST) -> Docstrings:
    """Draw docstrings of the largest modules, and split them.

    Parameters
    ----------
    seed : int
        Of the draw and of the split.
    cache : Path
        Directory to keep what was read from the sources.
    most : int
        How many of one module are drawn.
    """
    pool = _cached(cache_in(cache))
    names = sorted(sorted(pool, key=lambda name: (-len(pool[name]), name))[:CLASSES])
    rng = np.random.default_rng(seed)
    drawn = [(text, i) for i, name in enumerate(names) for text in rng.permutation(pool[name])[:most].tolist()]
    parts = split([label for _, label in drawn], SHARES, seed)
    test, validation, train = ([drawn[i] for i in part] for part in parts)
    return Docstrings(train, validation, test, names)


def cache_in(directory: Path) -> Path:
    """The file that keeps what was read from this Python's sources."""
    return directory / f"docstrings-{platform.python_version()}.json"


def read(root: Path | None = None) -> dict[str, list[str]]:
    """Read the first paragraphs of all docstrings, by top-level module.

    Texts that differ in case, digits or punctuation alone count as one, and none is kept that two modules have: so no
    text of one split has a twin in another.

    Parameters
    ----------
    root : Path, optional
        Directory of the modules; default: the standard library.
    """
    found: dict[str, dict[str, str]] = {}
    owners: Counter[str] = Counter()
    for module, text in _paragraphs(root or Path(sysconfig.get_paths()["stdlib"])):
        letters = re.sub(r"[\W\d_]+", " ", text.lower()).strip()
        if letters not in found.setdefault(module, {}):
            found[module][letters] = text
            owners[letters] += 1
    kept = {m: [text for letters, text in texts.items() if owners[letters] == 1] for m, texts in found.items()}
    return {module: texts for module, texts in kept.items() if texts}


def _paragraphs(root: Path) -> Iterator[tuple[str, str]]:
    for path in tqdm(sorted(root.rglob("*.py")), desc="reading docstrings", unit=" files", ncols=100):
        parts = path.relative_to(root).parts
        if NOT_LIBRARY.isdisjoint(parts[:-1]):
            for text in _docstrings(path):
                yield parts[0].removesuffix(".py"), text


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except SyntaxError:  # templates, and samples of other versions
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            words = (ast.get_docstring(node) or "").partition("\n\n")[0].split()
            if len(words) >= WORDS:
                yield " ".join(words)


def _cached(path: Path) -> dict[str, list[str]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            pool = read()
            write_atomically(path, lambda temporary: temporary.write_text(json.dumps(pool), encoding="utf-8"))
    return json.loads(path.read_text(encoding="utf-8"))
