# Set-up and everything else in one word each. `make demo` and `make test` need nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all test-gpu test-jetson lint format bench bench-memory bench-connectors small-model clean

demo: $(STAMP)
	$(BIN)/bridgeport demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not gpu and not tensorrt"

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu and not tensorrt"

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

# On a board, whose Python has TensorRT: no virtual environment is made. See docs/testing-on-devices.md.
test-jetson:
	BRIDGEPORT_TEST_BUNDLE="$(BRIDGEPORT_TEST_BUNDLE)" $(PYTHON) -m pytest -s -m tensorrt tests/tensorrt/test_on_device.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.chain

bench-memory: $(STAMP)
	$(BIN)/python -m benchmarks.export_memory

bench-connectors: $(STAMP)
	$(BIN)/python -m benchmarks.connectors

reduction-curve: $(STAMP)
	$(BIN)/python -m benchmarks.reduction

small-model: $(STAMP)
	$(BIN)/python -m bridgeport.models.small --out build/small-model

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "bridgeport: $$($(PYTHON) --version) is too old to export; install Python 3.11 to 3.13, or name one: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[export,cpu,dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
