"""The python blocks of every page of the documentation, run from top to bottom as one script each."""

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python( instead)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A block that shows what one would have written "instead" stands beside one of ours."""


def pages():
    """Pages with code; the landing page's is a fragment, which test_docs.py checks, and what a build makes is none."""
    found = sorted(page for page in DOCS.rglob("*.md") if not {"_build", "auto"} & set(page.relative_to(DOCS).parts))
    return [page for page in found if page.name != "index.md" and BLOCK.search(page.read_text(encoding="utf-8"))]


PAGES = pages()


def script_of(page, instead=False):
    """The blocks of a page; every other line is a comment, so that a traceback names the page's own lines.

    Or the blocks that are told from ours, after what stands above the first of them.
    """
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    first = next((index for index, match in enumerate(blocks) if match[1]), len(blocks))
    chosen = [match for match in blocks if not match[1]]
    if instead:
        chosen = blocks[:first] + [match for match in blocks if match[1]]
    kept = {number for match in chosen for number in _lines(text, match.span(2))}
    lines = text.split("\n")
    return "\n".join(line if number in kept else "#" for number, line in enumerate(lines))


def _lines(text, span):
    start, end = (text.count("\n", 0, position) for position in span)
    return range(start, end)


def test_there_is_a_guide():
    assert len(PAGES) >= 18 and {page.parent.name for page in PAGES} >= {"guide", "docs"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    script = tmp_path / f"{page.stem}.py"
    script.write_text(script_of(page), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(script), run_name="__main__")
    assert "tucka" in names, "a page without code of the library"


def test_the_code_beside_ours_runs(tmp_path, monkeypatch):
    pages = [page for page in PAGES if any(match[1] for match in BLOCK.finditer(page.read_text(encoding="utf-8")))]
    assert [page.stem for page in pages] == ["from-lora"]
    script = tmp_path / "from-lora.py"
    script.write_text(script_of(pages[0], instead=True), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(script), run_name="__main__")
    assert names["config"].peft_type == "LORA" and not hasattr(names["base"], "peft_config")
