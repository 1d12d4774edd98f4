# Two commands for a fresh machine: `make demo` makes a picture, `make test` passes the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test thorough lint types check compatibility setup clean

demo: setup
	$(BIN)/penstock generate demo "a red circle left of a blue square" --seed 0 --out out.png

test: setup
	$(BIN)/pytest --numprocesses 2 --dist worksteal

thorough: setup  # all combinations, of which `make test` takes some by turns
	PENSTOCK_THOROUGH=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: lint types test

compatibility: setup
	PENSTOCK_WRITE_PAGES=1 PENSTOCK_THOROUGH=1 $(BIN)/pytest -q tests/parity/test_compatibility.py

setup: .venv/ready

.venv/ready: pyproject.toml requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

clean:
	rm -rf .venv out.png
