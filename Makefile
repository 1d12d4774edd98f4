# Two commands for a fresh machine: `make demo` makes a picture, `make test` passes the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-avx2 thorough lint types check compatibility setup clean

demo: setup
	$(BIN)/penstock generate demo "a red circle left of a blue square" --seed 0 --out out.png

test: setup
	$(BIN)/pytest --numprocesses 2 --dist worksteal

test-avx2: setup  # what compares bits and tolerances, with the kernels of a processor without AVX-512
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(BIN)/pytest -q --numprocesses 2 \
		--dist worksteal tests/parity/test_offload.py tests/parity/test_shards.py tests/parity/test_load.py \
		tests/distributed/guidance/test_calls.py tests/test_tolerance.py

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
