"""What is published: the source archive, the wheel that is built from it, and the quickstart from that wheel alone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_BEHIND = (".*", "out", "build", "dist", "_build", "auto", "*.egg-info", "__pycache__")
"""What a clone does not hold."""


def build(what, source, target):
    """Let the build backend of this environment make an archive, as pip does without isolation."""
    script = f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(target)], cwd=source, check=True, capture_output=True)
    (archive,) = target.iterdir()
    return archive


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the tree."""
    return shutil.copytree(
        ROOT, tmp_path_factory.mktemp("clone") / "tucka", ignore=shutil.ignore_patterns(*LEFT_BEHIND)
    )


@pytest.fixture(scope="module")
def sdist(clone, tmp_path_factory):
    """The unpacked source archive."""
    work = tmp_path_factory.mktemp("sdist")
    (work / "dist").mkdir()
    with tarfile.open(build("sdist", clone, work / "dist")) as archive:
        archive.extractall(work, filter="data")
    (unpacked,) = work.glob("tucka-*")
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The unpacked wheel, built from the source archive."""
    work = tmp_path_factory.mktemp("wheel")
    (work / "dist").mkdir()
    with zipfile.ZipFile(build("wheel", sdist, work / "dist")) as archive:
        archive.extractall(work / "site")
    return work / "site"


def files(directory, *parts):
    """The files below parts of a directory, as texts relative to it."""
    found = (path for part in parts for path in (directory / part).rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix() for path in found}


def test_the_source_archive_holds_tests_and_pages(clone, sdist):
    parts = ("tucka", "analysis", "examples", "benchmarks", "tests", "docs")
    assert files(sdist, *parts) == files(clone, *parts)
    alone = {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "Makefile", "constraints.txt"}
    assert {*alone, "setup.cfg", "pyproject.toml"} <= {path.name for path in sdist.iterdir()}


def test_the_wheel_holds_both_packages_and_the_quickstart_alone(clone, wheel):
    assert {path.name.partition("-")[0] for path in wheel.iterdir()} == {"tucka", "analysis"}
    example = {"tucka/examples/__init__.py", "tucka/examples/quickstart.py"}
    assert files(wheel, "tucka", "analysis") == files(clone, "tucka", "analysis") | example
    assert {"tucka/py.typed", "analysis/py.typed", "analysis/report/page.css"} <= files(wheel, "tucka", "analysis")


def test_what_the_wheel_says_of_itself(wheel):
    (directory,) = wheel.glob("*.dist-info")
    found = PathDistribution(directory)
    read = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff", "README.md")}
    assert f"## {found.version} " in re.findall(r"^## .*", read["CHANGELOG.md"], re.MULTILINE)[0]
    assert f"\nversion: {found.version}\n" in read["CITATION.cff"]
    assert (found.metadata["Name"], found.metadata["License"]) == ("tucka", "Apache-2.0")
    assert found.metadata["Requires-Python"] == "<3.14,>=3.10"
    assert found.metadata.get_payload().strip() == read["README.md"].strip()
    plain = {re.split(r"[<>=\[]", line)[0] for line in found.requires if "extra ==" not in line}
    assert {"torch", "transformers", "peft", "accelerate", "tensorly", "tensorly-torch"} <= plain
    assert not plain & {"pytest", "datasets", "sphinx"}
    assert (directory / "licenses" / "LICENSE").is_file()


def test_the_quickstart_starts_from_the_wheel_alone(wheel, tmp_path):
    """No .pth file is read (-S), so an editable installation does not lend what the wheel lacks."""
    script = """
import runpy, sys, tucka
print(tucka.__file__, tucka.__version__, sep="\\n")
assert not {"tucka.examples", "analysis"} & set(sys.modules)
sys.argv[1:] = ["--help"]
runpy.run_module("tucka.examples.quickstart", run_name="__main__", alter_sys=True)
"""
    checkout = {str(ROOT / part) for part in ("", "tests", "examples")}
    path = os.pathsep.join([str(wheel), *(entry for entry in sys.path if entry and entry not in checkout)])
    command = [sys.executable, "-S", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    place, version, usage, *_ = done.stdout.split("\n")
    assert Path(place) == wheel / "tucka" / "__init__.py"
    assert (wheel / f"tucka-{version}.dist-info").is_dir()
    assert usage.startswith("usage:") and "quickstart" in usage
