"""Places where a long name in a table may go on in the next line, so that tables fit narrow screens."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

CELL = re.compile(r"<td.*?</td>", re.DOTALL)
NAME = re.compile(r'(<span class="pre">)([^<]{12,})(</span>)')
AFTER = re.compile(r"(?<=[\w\])])([_.(=,])(?=[\w\"&])")


def add_breaks(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Mark in every cell where names may break: after an underscore, a dot, a bracket, an equals sign or a comma."""
    if "body" in context:
        context["body"] = CELL.sub(lambda cell: NAME.sub(_broken, cell[0]), context["body"])


def _broken(name: re.Match[str]) -> str:
    return name[1] + AFTER.sub(r"\1<wbr>", name[2]) + name[3]


def setup(app: Sphinx) -> dict[str, Any]:
    """Run when pages are written."""
    app.connect("html-page-context", add_breaks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
