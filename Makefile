# A fresh machine needs Python 3.11+, make and a C++ compiler (hnswlib is built from source).
#   make demo       install, then run the main job on a simulated shop
#   make test       install, then run the quick tests
#   make test-all   the slow tests
#   make lint       ruff and mypy
# Another interpreter: make demo PYTHON=python3.12.  Another environment: make test VENV=/tmp/venv.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# Stamps: an environment is made again only when what it is made from has changed.
STAMPS := pyproject.toml constraints.txt

.PHONY: install demo test test-all lint format clean

install: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11. Name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(STAMPS) | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(STAMPS) | $(VENV)/bin/python
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(STAMPS) | $(VENV)/bin/python
	$(PIP) -e '.[test,dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

demo: $(VENV)/.installed
	$(BIN)/recsys demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
