# make run: set up if needed, then self-play with the default config. make test: the default test suite.
PYTHON ?= python3.11
BIN := .venv/bin
HERE := PYTHONPATH=$(CURDIR):$(CURDIR)/kernels

.venv/.installed: requirements/cpu.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# what only tests need, on top: llama.cpp and its quantisers, two processes
.venv/.tested: .venv/.installed requirements/test.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/test.lock
	touch $@

.PHONY: setup run test test-gpu test-slow test-faults check-t4 check-cuda13 check-colab check-torch lint bench rehearse-t4
setup: .venv/.installed

run: setup
	$(BIN)/python -m spinfast.run

test: .venv/.tested
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/.tested
	$(BIN)/python -m pytest -m slow

# with the python of a GPU's set (requirements/t4.lock, cuda13.lock): GPU_PYTHON=/path/to/python make test-gpu
GPU_PYTHON ?= python
test-gpu:
	$(HERE) $(GPU_PYTHON) -m pytest tests/kernels tests/test_attention.py tests/test_fuse.py tests/test_sums.py \
	  -m "not slow and not faults"

# a GPU's set, installed for real and driven without a card (docs/without-a-gpu.md); the first time downloads 5 GB
SEAMS := "tests/test_unsloth.py::test_same_log_probs_and_gradients_as_the_stock_policy[gpu-qwen2-float16]"
check-t4 check-cuda13: check-%:
	python=$$(tests/cuda_sets/environment.sh $*) && TRITON_INTERPRET=0 $(HERE) $$python -m pytest \
	  tests/cuda_sets tests/engine/test_dense_adapters.py tests/kernels/test_compile.py $(SEAMS) -m "not gpu and not faults"

# Colab's Python 3.13 and torch, with what requirements/colab.lock adds: no vLLM, xformers, Unsloth
check-colab:
	python=$$(tests/cuda_sets/environment.sh colab) && TRITON_INTERPRET=0 $(HERE) $$python -m pytest \
	  tests/cuda_sets/test_commands.py tests/cuda_sets/test_step.py tests/cuda_sets/test_runs.py tests/kernels/test_compile.py \
	  -k "not vllm and not xformers and not trl and not notebook and not doctor" -m "not gpu and not faults"

# what is in plain torch, under other versions of it, each over the set of its CUDA: TORCH="2.9.1 2.12.0" make check-torch
TORCH ?= 2.9.1 2.10.0 2.11.0 2.12.1 2.13.0
PLAIN := $(patsubst %,tests/%.py,kernels/test_cpu kernels/test_linear_logps kernels/test_pairwise test_attention \
  test_device test_memory test_objectives test_packing test_policy test_run test_torch_names)
check-torch:
	for torch in $(TORCH); do \
	  case $$torch in 2.9.*|2.10.*) set=t4;; *) set=cuda13;; esac; \
	  python=$$(tests/cuda_sets/environment.sh $$set $$torch) && echo "torch $$torch" && \
	  $(HERE) $$python -m pytest $(PLAIN) || exit 1; \
	done

test-faults: setup
	$(BIN)/python -m pytest -m "faults and not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python -m bench iteration

rehearse-t4: setup
	$(BIN)/python -m bench rehearse
