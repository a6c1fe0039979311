"""Fields of named tuples, told by the comments beside them: the source says it once, where a reader meets it."""

from __future__ import annotations

import inspect
import re
from typing import Any

from sphinx.application import Sphinx

FIELD = re.compile(r"^    (?P<name>[a-z]\w*): (?P<kind>[^=#]+?)(?: = [^#]+?)?(?:  # (?P<text>.+))?$", re.MULTILINE)


def add_fields(app: Sphinx, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Append a section of attributes to the docstring of a named tuple that has none."""
    is_tuple = inspect.isclass(item) and issubclass(item, tuple) and bool(getattr(item, "_fields", ()))
    if not is_tuple or "Attributes" in lines:
        return
    found = [field for field in FIELD.finditer(inspect.getsource(item)) if field["name"] in item._fields]
    lines += ["", "Attributes", "----------"]
    for field in found:
        lines += [f"{field['name']} : {field['kind']}", f"    {field['text'] or ''}"]
    lines.append("")


def skip_aliases(app: Sphinx, what: str, name: str, item: Any, skip: bool, options: Any) -> bool | None:
    """Leave out "Alias for field number 0"."""
    return True if type(item).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Run before numpydoc, which reads the sections."""
    app.connect("autodoc-process-docstring", add_fields, priority=400)
    app.connect("autodoc-skip-member", skip_aliases)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
