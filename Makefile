# make run: set up if needed, then self-play with the default config. make test: the default test suite.
PYTHON ?= python3.11
BIN := .venv/bin

.venv/.installed: requirements/cpu.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

.PHONY: setup run test test-gpu test-slow test-faults lint bench rehearse-t4
setup: .venv/.installed

run: setup
	$(BIN)/python -m spinfast.run

test: setup
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

# with the python of a GPU's set (requirements/t4.lock, cuda13.lock): GPU_PYTHON=/path/to/python make test-gpu
GPU_PYTHON ?= python
test-gpu:
	PYTHONPATH=.:kernels $(GPU_PYTHON) -m pytest tests/kernels tests/test_attention.py tests/test_fuse.py tests/test_sums.py \
	  -m "not slow and not faults"

test-faults: setup
	$(BIN)/python -m pytest -m "faults and not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python -m bench iteration

rehearse-t4: setup
	$(BIN)/python -m bench rehearse
