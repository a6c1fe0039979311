"""The blocks of the README and of the landing page, each run on small objects; commands of all pages by their words."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from page_names import names, save_files

import analysis
from analysis import sweep
from analysis.__main__ import main as analysis_command

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """The blocks of a page, each after as many empty lines as stand above it: tracebacks then have its lines."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in BLOCK.finditer(text) if match[1] == language]
    return ["\n" * text.count("\n", 0, match.start(2)) + match[2] for match in found]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with what a reader has by then: the quickstart's output, LoRAs, a model."""
    directory = tmp_path_factory.mktemp("readme")
    specification = importlib.util.spec_from_file_location("quickstart", ROOT / "examples" / "quickstart.py")
    quickstart = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(quickstart)
    sizes = ["--samples", "120", "--epochs", "1", "--pretrain-epochs", "1", "--batch-size", "32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        quickstart.main(sizes)
        save_files(directory)
    return directory


CASES = [
    pytest.param(page, block, id=f"{page.stem}-{number}")
    for page in (ROOT / "README.md", DOCS / "index.md")
    for number, block in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize(("page", "block"), CASES)
def test_a_block_runs(page, block, place, monkeypatch):
    monkeypatch.chdir(place)
    one_process = lambda *args, n_jobs=None, **options: sweep(*args, **options)  # noqa: E731  (test_sweep.py has more)
    monkeypatch.setattr(analysis, "sweep", one_process)
    exec(compile(block, str(page), "exec"), {**names(place), "__name__": "__main__"})


def commands(page):
    """The commands of a page: of shell blocks, of indented lines, and within a line."""
    text = page.read_text(encoding="utf-8")
    fenced = "\n".join(block for kind, block in BLOCK.findall(text) if kind in ("sh", "bash"))
    indented = "\n".join(re.findall(r"^ {4}((?:python|accelerate launch) (?:[^\n\\]|\\\n)*)", text, re.MULTILINE))
    lines = [*joined(fenced), *joined(indented), *re.findall(r"`(python (?:-m|examples)[^`]+)`", text)]
    return [words for line in lines if (words := line.partition("#")[0].split())]


def joined(block):
    return re.sub(r"\\\n\s*", " ", block).splitlines()


def test_the_readmes_report_and_figure_are_made(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    made = []
    for block in blocks(ROOT / "README.md", "sh"):
        for line in joined(block):
            words = shlex.split(line, comments=True)
            if words[:3] == ["python", "-m", "analysis"]:
                analysis_command(words[3:])
                made.append(words[words.index("-o") + 1])
    assert made == ["report.html", "similarity.pdf"]
    assert all((place / name).stat().st_size > 5000 for name in made)


def source_of(words):
    """What writes down the options of a command of ours: its script or package; None for other commands."""
    if words[0] == "accelerate":
        words = ["python", *words[words.index("launch") + 1 :]]
    name = words[2 if words[1] == "-m" else 1] if words[0] == "python" and len(words) > 1 else ""
    if name.startswith("examples/"):
        places = [ROOT / name, *sorted((ROOT / "examples" / "common").glob("*.py"))]
    elif name.startswith(("analysis", "benchmarks", "tests.", "tucka.examples.")):
        module = importlib.util.find_spec(name.replace("tucka.examples", "examples"))
        folder = Path(module.origin).parent
        places = sorted(folder.rglob("*.py")) if folder.name != "examples" else [Path(module.origin)]
    else:
        return None
    return "\n".join(place.read_text(encoding="utf-8") for place in places)


def test_commands_of_pages_have_the_options_they_are_given(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    folders = (ROOT, DOCS, DOCS / "guide", DOCS / "results")
    pages = [page for folder in folders for page in folder.glob("*.md")] + sorted((ROOT / "examples").glob("*.py"))
    checked = 0
    for page in pages:
        for words in commands(page):
            source = source_of(words)
            options = [word for word in words if word.startswith("--")] if source else []
            checked += len(options)
            for option in options:  # one with a --no- beside it is written down as a name
                there = f'"{option}"' in source or re.search(rf"\b{option[2:].replace('-', '_')}\b", source)
                assert there, f"{page.name}: {option} of {' '.join(words)}"
    assert checked > 60
