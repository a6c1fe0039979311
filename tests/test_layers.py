"""The layers that CONTRIBUTING.md draws: modules import those of their own layer and of the layers above."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tucka"


def layers():
    """Place of every module and subpackage in the table of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("| layer | in `tucka/` |")[2].partition("\n\n")[0]
    rows = [line.split("|")[2] for line in table.splitlines()[2:]]
    return {name: place for place, row in enumerate(rows) for name in re.findall(r"`(\w+)(?:\.py|/)`", row)}


def imported(path):
    """Modules and subpackages of the package that a file imports when it is imported itself."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]


def test_the_table_names_every_module():
    found = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(layers()) == found - {"__init__"}


def test_no_module_imports_a_layer_below_its_own():
    place, links = layers(), 0
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in imported(path) if own != "__init__" else ():
            links += 1
            assert place[other] <= place[own], f"{path.relative_to(ROOT)} imports {other}"
    assert links > 150


def test_nothing_in_the_library_imports_analysis():
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) analysis\b", path.read_text(encoding="utf-8"), re.MULTILINE), path
