# Everything runs in .venv, which the first target that needs it creates.
# PYTHON=python3.12 picks another interpreter; ALL=1 makes the demo run every model.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
TYPES := build/types

# Python must not put the working directory on sys.path: the folder `kernels` would be importable
# under that name and hide the PyPI package of the same name.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types unit golden long gpu format clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

setup: $(VENV)/.stamp  ## create .venv and install what development needs

# torch comes first and pinned: a CPU wheel of exactly this version is enough, while a bare `torch`
# resolved together with the extras may pull gigabytes of CUDA libraries.
$(VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

demo: setup  ## rewrite a model and show what changed; ALL=1 runs every model
	$(BIN)/python examples/demo.py $(if $(ALL),--all)

test: lint types unit  ## everything CI runs: lint, types, unit

lint: setup  ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On the editable install mypy finds only some of the files and still says "Success",
# so it reads an installed copy.
types: setup  ## mypy, strict, on an installed copy
	rm -rf build
	$(PIP) --no-build-isolation --no-deps --target $(TYPES) .
	cd $(TYPES) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p fxpass

# Two processes take 16 minutes on two cores, one takes 22. Each has models in memory: 8 at most.
unit: setup  ## the tests; ARGS='-k packaging' picks some
	$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

golden: setup  ## rewrite the golden files and README tables; read the diff before committing
	$(BIN)/pytest --update-golden $(ARGS)

long: setup  ## the tests of every model, half an hour
	$(BIN)/pytest -m long $(ARGS)

gpu: setup  ## the tests that need a GPU
	$(BIN)/pytest -m gpu $(ARGS)

format: setup  ## format and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove build products, not .venv
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
