# Everything here works on a fresh clone with only Python, make and git: the targets make .venv themselves.
#   make demo   make test   make ci          PYTHON=python3.12 make test   chooses the interpreter
SHELL := /bin/bash
PYTHON ?= python3
WORKERS ?= 2
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
# One thread for each process: the tests run in several processes, and more threads than cores slow all of them.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help demo test lint format docs notebooks ci clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       compare families and objectives on three problems; writes results/demo"
	@echo "make test       the tests, then the examples in the docstrings"
	@echo "make lint       ruff (rules and format) and mypy"
	@echo "make docs       the documentation, in docs/_build/html"
	@echo "make notebooks  run the notebooks in their short mode"
	@echo "make ci         all of it, as .ci/run does"
	@echo "make clean      remove .venv, results and everything built"

# --- the environment: one stamp per set of extras, so that nothing is installed twice ---

$(VENV)/.torch: constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "error: '$(PYTHON)' was not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: vifamily needs Python 3.11 or newer, and '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "error: '$(PYTHON)' has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "installing the tested set (a few minutes the first time)"
	$(PIP) torch==2.13.0
	@touch $@

$(VENV)/.base: $(VENV)/.torch pyproject.toml
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable ".[dev]"
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) --editable ".[docs]"
	@touch $@

# --- what one wants done ---

demo: $(VENV)/.base
	$(BIN)/vifamily compare --out results/demo

test: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --doctest-modules --durations=3 vifamily

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	$(ONE_THREAD) $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

notebooks: $(VENV)/.dev
	$(ONE_THREAD) VIFAMILY_SHORT=1 $(BIN)/python tests/run_notebooks.py

ci:
	.ci/run

clean:
	rm -rf $(VENV) results docs/_build docs/api docs/registry docs/notebooks build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find vifamily tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
