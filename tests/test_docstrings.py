"""The examples in docstrings, which the reference shows: run, on small objects where they say nothing of their own."""

import doctest
import importlib
import io
import pkgutil
import re
from contextlib import redirect_stdout

import page_names
import pytest

import analysis
import tucka

SKIP = re.compile(r"\s*# doctest: \+SKIP")


def modules():
    """All modules of both packages that can be imported without running."""
    for package in (tucka, analysis):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.startswith("tucka.examples") and not found.name.endswith("__main__"):
                yield importlib.import_module(found.name)


def found_examples():
    finder = doctest.DocTestFinder(recurse=True, exclude_empty=True)
    return [test for module in modules() for test in finder.find(module) if test.examples]


CASES = found_examples()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("docstrings")
    page_names.save_files(directory)
    return directory


def test_there_are_examples():
    assert {"tucka.apply.apply", "tucka.optim.hold_unselected", "analysis.parameters.count"} <= {
        test.name for test in CASES
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_example_runs(case, place, monkeypatch):
    """Also what a plain doctest leaves out (+SKIP) for want of a model; what that prints is not compared."""
    monkeypatch.chdir(place)
    scope = {**case.globs, **page_names.names(place)}
    for example in case.examples:
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(SKIP.sub("", example.source), case.name, "single"), scope)
        assert doctest.SKIP in example.options or printed.getvalue() == example.want, example.source
