"""The notebook: its code cells, run from top to bottom at a size that takes seconds."""

import ast
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parents[1]
PATH = ROOT / "examples" / "first_half_hour.ipynb"
SMALL = "SAMPLES = 160\nPRETRAIN_EPOCHS, EPOCHS = 1, 1\n"


def cells(kind):
    return [cell for cell in json.loads(PATH.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def run_cell(source, names, title):
    """Run a cell as a notebook does, and return the value of its last line, if that is an expression."""
    tree = ast.parse(source, title)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, title, "exec"), names)
    return None if last is None else eval(compile(last, title, "eval"), names)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The names that the notebook leaves, what each cell shows, and where it wrote."""
    display = ModuleType("IPython.display")
    display.HTML = lambda data: SimpleNamespace(data=data)
    names, shown = {"__name__": "__main__"}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "IPython.display", display)
        patch.setattr(plt, "show", lambda: None)
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        for number, cell in enumerate(cells("code")):
            source = "".join(cell["source"])
            if "parameters" in cell["metadata"].get("tags", ()):
                source += f"\n{SMALL}"
            shown.append(run_cell(source, names, f"<code cell {number}>"))
        figures = plt.get_fignums()
        plt.close("all")
        yield SimpleNamespace(**names, shown=shown, figures=figures, here=Path.cwd())


def test_it_is_stored_without_outputs():
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in cells("code")) == 1
    for cell in cells("code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
    assert len({cell["id"] for kind in ("code", "markdown") for cell in cells(kind)}) >= 20


def test_its_links_lead_somewhere():
    text = "".join("".join(cell["source"]) for cell in cells("markdown"))
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) >= 4
    for link in links:
        assert (PATH.parent / link).exists(), link


def test_it_goes_from_wrap_to_report(ran):
    assert ran.difference == 0
    assert ran.equal, "the reloaded adapter"
    assert ran.diagnosis.ok, str(ran.diagnosis)
    assert list(ran.scores) == ["before adaptation", "TuckA", ran.name]
    assert 0 < ran.sizes["TuckA"] <= ran.sizes[ran.name]
    assert len(ran.figures) >= 5
    for lora in ran.export.loras:
        assert (ran.here / lora.directory / "adapter_model.safetensors").is_file()
    tables = [value for value in ran.shown if hasattr(value, "columns")]
    assert len(tables) >= 4 and not any(table.isna().any(axis=None) for table in tables)


def test_the_report_is_written_and_shown(ran):
    page = (ran.here / ran.OUT / "report.html").read_text(encoding="utf-8")
    for part in ('id="routing', 'id="ranks', 'id="similarity', 'id="load'):
        assert part in page, part
    assert 'srcdoc="&lt;!DOCTYPE html&gt;' in ran.shown[-1].data
