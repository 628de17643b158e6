# What a developer does here, by name. `make` alone lists it.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help lab up test test-fast check format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=python3.12 chooses the Python of .venv (3.11 to 3.13), ARGS=... goes to tpv or pytest"

lab: .venv/lab ## Install, start everything and run the whole story on a small built-in example
	$(BIN)/tpv lab run $(ARGS)

up: .venv/lab ## Run the registry here until Ctrl-C (ARGS="--port 9000")
	$(BIN)/tpv up $(ARGS)

test: .venv/dev ## Run all tests, those with real processes one after another (ARGS="--durations 20")
	$(BIN)/pytest -n auto -m "not slow" $(ARGS)
	$(BIN)/pytest -m slow $(ARGS)

test-fast: .venv/dev ## Run the tests that take no real processes or models
	$(BIN)/pytest -n auto -m "not slow" $(ARGS)

check: .venv/dev ## Check style, types, and that generated files are fresh
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.13
	$(BIN)/python scripts/unasync.py --check

format: .venv/dev ## Sort imports, fix what can be fixed, format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove .venv and all caches
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: installed once, and again when the requirements change.
.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Python 3.11 to 3.13 is needed; say which: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/lab: .venv/bin/pip pyproject.toml constraints.txt
	$(INSTALL) --editable '.[lab]'
	@touch $@

.venv/dev: .venv/bin/pip pyproject.toml constraints.txt
	$(INSTALL) --editable '.[dev]'
	@touch .venv/lab $@
