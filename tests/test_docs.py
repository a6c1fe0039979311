"""The documentation against the code: every public name has a page, messages are quoted as they are, links lead on."""

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import analysis
import analysis.report
import tucka
import tucka.loras
from tucka.config import TuckAConfig

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGES = (
    tucka, tucka.export, tucka.ranks, tucka.loras, tucka.diagnosis,
    analysis, analysis.plots, analysis.report, analysis.scaling, analysis.sweeps,
)  # fmt: skip
PAGES = sorted(page for page in DOCS.rglob("*.md") if not {"_build", "auto"} & set(page.parts))
FRAGMENTS = [ROOT / "README.md", DOCS / "index.md", *sorted((DOCS / "guide").glob("*.md"))]


# --- the reference ---------------------------------------------------------------------------------------------------


def listed():
    """Full names that the pages of the reference list."""
    names = []
    for page in sorted((DOCS / "api").glob("*.rst")):
        module = ""
        for line in page.read_text(encoding="utf-8").splitlines():
            if found := re.match(r"\.\. (?:currentmodule|py:data|automodule):: ([\w.]+)", line):
                module = found[1] if "currentmodule" in line else module
                names += [] if "currentmodule" in line else [found[1]]
            elif re.fullmatch(r"   \w+", line) and module and line.strip() not in ("wrap",):
                names.append(f"{module}.{line.strip()}")
    return names


def resolved(name):
    """The object of a full name; a package's function before a module of that name."""
    outer, _, end = name.rpartition(".")
    for owner in (resolved(outer), sys.modules.get(outer)) if outer else ():
        if end in dir(owner):
            return getattr(owner, end)
    return importlib.import_module(name)


def test_every_public_name_has_a_page_and_every_page_a_name():
    names = listed()
    objects = [resolved(name) for name in names]
    assert len(names) == len(set(names)) > 100
    for package in PACKAGES:
        for name in package.__all__:
            there = f"{package.__name__}.{name}" in names or any(getattr(package, name) is one for one in objects)
            assert there, f"{package.__name__}.{name} is on no page of docs/api"


def test_every_public_name_says_what_it_is():
    for name in listed():
        thing = resolved(name)
        if callable(thing) or inspect.ismodule(thing):
            assert inspect.getdoc(thing) and not inspect.getdoc(thing).startswith(f"{name.rpartition('.')[2]}("), name


def test_every_field_of_the_configuration_is_explained():
    doc = inspect.getdoc(TuckAConfig)
    entries = re.findall(r"^([\w, ]+?)(?: : .+)?$\n {4}\S", doc, re.MULTILINE)
    explained = {name.strip() for entry in entries for name in entry.split(",")}
    own = {name for name in TuckAConfig.__annotations__ if name in TuckAConfig.__dataclass_fields__}
    fields = {name for name in own if not str(TuckAConfig.__annotations__[name]).startswith("InitVar")}
    assert {"r", "routing", "factor_owners"} <= fields
    assert fields - explained == set()


# --- what pages quote ------------------------------------------------------------------------------------------------


def pattern_of(text):
    """An expression for what a constant, an f-string or the sum of both says; None for anything else."""
    if isinstance(text, ast.BinOp):
        left, right = pattern_of(text.left), pattern_of(text.right)
        return left and left + (right or ".*")
    if isinstance(text, ast.JoinedStr):
        return "".join(pattern_of(part) or ".*" for part in text.values)
    return re.escape(text.value) if isinstance(text, ast.Constant) and isinstance(text.value, str) else None


def messages():
    """What the library says when it raises or warns, as expressions that a filled message matches."""
    found = []
    for source in sorted((ROOT / "tucka").rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        found += [pattern_of(call.args[0]) for call in calls if call.args]
    return [re.compile(pattern, re.DOTALL) for pattern in found if pattern and len(pattern.replace(".*", "")) > 9]


def test_the_errors_of_the_page_are_those_of_the_library():
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^```text\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    known = messages()
    assert len(quoted) >= 15
    for message in (" ".join(lines.split()) for lines in quoted):
        assert any(pattern.fullmatch(message) for pattern in known), f"the library says no longer: {message}"


def fragments(page):
    """The blocks of a page that no test runs, where an ellipsis stands for anything."""
    kind = r"python no-run" if page.parent.name == "guide" else r"python"
    text = page.read_text(encoding="utf-8")
    return [
        block.replace("…", "...") for block in re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def chain(node):
    """tucka.ranks.prune of its tree, or None."""
    if isinstance(node, ast.Name):
        return node.id
    inner = chain(node.value) if isinstance(node, ast.Attribute) else None
    return None if inner is None else f"{inner}.{node.attr}"


def test_blocks_that_are_not_run_name_what_exists():
    checked = 0
    for page in FRAGMENTS:
        for block in fragments(page):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("tucka", "analysis"):
                    assert all(resolved(f"{node.module}.{alias.name}") for alias in node.names)
                name = chain(node) if isinstance(node, ast.Attribute) else None
                if name and name.split(".")[0] in ("tucka", "analysis"):
                    assert resolved(name) is not None, f"{page.name}: {name}"
                name = chain(node.func) if isinstance(node, ast.Call) else None
                if name and name.split(".")[0] in ("tucka", "analysis"):
                    parameters = inspect.signature(resolved(name)).parameters.values()
                    free = any(one.kind is one.VAR_KEYWORD for one in parameters)
                    known = {one.name for one in parameters}
                    assert free or {key.arg for key in node.keywords} <= known, f"{page.name}: {name}"
                    checked += 1
    assert checked > 25


# --- links and the picture -------------------------------------------------------------------------------------------


def anchors(page):
    """The anchors of a page's headings."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_on(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        there = page.parent / path if path else page
        assert there.exists(), f"{target} leads nowhere"
        assert not anchor or there.suffix != ".md" or anchor in anchors(there), f"{target} names no heading"
    for target in re.findall(r"^:link: (\S+)$", prose, re.MULTILINE):
        made_by_the_build = target.startswith("auto/")
        assert made_by_the_build or any((page.parent / f"{target}{end}").exists() for end in (".md", ".rst")), target


@pytest.fixture(scope="module")
def picture():
    specification = importlib.util.spec_from_file_location("tensor", DOCS / "pictures" / "tensor.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_picture_is_drawn(picture, tmp_path):
    path = picture.main(["-o", str(tmp_path / "tensor.svg")])
    shapes = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}path")
    kept = ElementTree.parse(DOCS / "images" / "tensor.svg").iter("{http://www.w3.org/2000/svg}path")
    assert len(list(shapes)) > 60 and len(list(kept)) > 60


def test_the_picture_reads_on_a_phone(picture):
    figure = picture.draw()
    (axes,) = figure.axes
    figure.canvas.draw()
    width = figure.get_size_inches()[0] * 72
    for text in axes.texts:
        assert text.get_fontsize() / width * 360 > 9, f"{text.get_text()!r} is {text.get_fontsize()} pt"
        box = text.get_window_extent()
        inside = (
            figure.bbox.x0 <= box.x0
            and box.x1 <= figure.bbox.x1
            and figure.bbox.y0 <= box.y0
            and box.y1 <= figure.bbox.y1
        )
        assert inside, f"{text.get_text()!r} leaves the picture"
