# Everything runs in .venv, which is made on first use and again when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo setup test test-all check bench docs

demo: .venv/.installed
	$(BIN)/martlet demo --out runs/demo --overwrite

setup: .venv/.installed

# A thread a process: tests are small, and threads that wait for each other take longer than one alone.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: .venv/.installed
	$(PYTEST)

test-all: .venv/.installed
	$(PYTEST) -m ''

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python tools/docs.py --check

bench: .venv/.benchmarks
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python tools/docs.py

docs: .venv/.installed
	$(BIN)/python tools/docs.py

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Martlet needs Python 3.11 or newer, as in: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "Installing into .venv; the first time this takes a few minutes."
	@$(PIP) --editable '.[dev]'
	@touch $@

.venv/.benchmarks: .venv/.installed pyproject.toml
	@$(PIP) --editable '.[bench]'
	@touch $@
