# demo: the whole road on a fresh clone.  test: everything CI runs.  check: format, types, layers.  bench: the numbers.  docs: the site.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-faults check check-security format bench docs package clean

.venv/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# torch first and by its pin: a plain name would bring in gigabytes of CUDA that this does not need
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.runtime
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	# the reference package, only to hold our files against, without the notebook stack that it asks for; and axe, whose
	# script is all that is used of it, without playwright
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps mlc-chakra axe-playwright-python
	touch $@

demo: .venv/.runtime
	$(BIN)/meshloom demo

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest

test-slow: .venv/.dev
	$(BIN)/python -m pytest -m slow

test-faults: .venv/.dev
	$(BIN)/python -m pytest -m faults

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.dev
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/all.py --write

# pip-audit asks a database of known faults, so it needs a network
check-security: .venv/.dev
	$(BIN)/bandit -q -r src/meshloom -ll -c pyproject.toml
	$(BIN)/pip-audit --strict --skip-editable || { echo "pip-audit: a fault was found, or its database could not be asked: \
	it needs the network; bandit found nothing" >&2; exit 1; }

package: .venv/.dev
	$(BIN)/python benchmarks/package.py

docs: .venv/.runtime
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
