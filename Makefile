# make run: set up if needed, then self-play with the default config. make test: the default test suite.
PYTHON ?= python3.11
BIN := .venv/bin

.venv/.installed: requirements/cpu.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

.PHONY: setup run test test-gpu test-slow test-faults check-t4 check-cuda13 lint bench rehearse-t4
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

# a GPU's set, installed for real and driven without a card (docs/without-a-gpu.md); the first time downloads 5 GB
check-t4 check-cuda13: check-%:
	python=$$(tests/cuda_sets/environment.sh $*) && TRITON_INTERPRET=0 PYTHONPATH=.:kernels $$python -m pytest \
	  tests/cuda_sets tests/engine/test_single_adapter.py tests/kernels/test_compile.py -m "not gpu and not faults"

test-faults: setup
	$(BIN)/python -m pytest -m "faults and not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python -m bench iteration

rehearse-t4: setup
	$(BIN)/python -m bench rehearse
