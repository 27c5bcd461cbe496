# `make demo` and `make test` need nothing before them but Python >= 3.10 and make.
# CPU only? PyPI's torch for Linux brings CUDA along; PIP_INSTALL_ARGS="--extra-index-url <PyTorch's CPU index>" avoids it.

PYTHON ?= python3
PIP_INSTALL_ARGS ?=
# A machine with a GPU comes with a torch that fits it: `make gpu` uses that python as it is and installs nothing.
# GPU_MINUTES is the time for all of `make gpu`, of which the tests begin nothing new after GPU_TEST_MINUTES.
GPU_PYTHON ?= $(PYTHON)
GPU_MINUTES ?= 9
GPU_TEST_MINUTES ?= 4
BENCH_ARGS ?=
TEST_ARGS ?=
# Processes that share the tests, each with one thread of PyTorch's.
TEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.ready-bench
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt $(PIP_INSTALL_ARGS)

.DELETE_ON_ERROR:
.PHONY: help venv demo test slow lint notebooks bench gpu gpu-tests gpu-bench clean

help:
	@echo "make demo   patch, adapt and measure the embedded model; writes demo/ (minutes)"
	@echo "make test   the tests, without the slow ones and those for a GPU"
	@echo "make slow   the slow tests        make gpu   the tests for a GPU, then the benchmarks there (GPU_MINUTES=9)"
	@echo "make lint   ruff and mypy         make bench ratios against other attentions (BENCH_ARGS=--quick: minutes)"
	@echo "make notebooks   run the notebooks and keep what they give, pictures included"
	@echo "make venv   only create .venv     make clean remove .venv, demo/ and caches"

venv: $(READY)

# torch comes first and alone, so that the pinned build is in place before anything that merely depends on it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "hf_sparse needs Python >= 3.10, but $(PYTHON) is $$($(PYTHON) -V 2>/dev/null || echo missing); run: make PYTHON=/path/to/python3.10 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "installing into $(VENV) (once; minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) -e ".[plot,test,dev]"
	@touch $@

$(BENCH_READY): $(READY)
	@$(PIP_INSTALL) -e ".[bench]"
	@touch $@

demo: $(READY)
	$(BIN)/python recipes/demo.py

notebooks: $(READY)
	$(BIN)/python notebooks/execute.py notebooks/*.ipynb

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n $(TEST_WORKERS) --dist worksteal $(TEST_ARGS)

slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout 1800

# Both parts run, whatever the first one finds; the second gets the time that is left.
gpu:
	@started=$$(date +%s); $(MAKE) --no-print-directory gpu-tests; tests=$$?; \
	left=$$((60 * $(GPU_MINUTES) - $$(date +%s) + started)); \
	left=$$((left > 30 ? left : 30)); \
	$(MAKE) --no-print-directory gpu-bench BENCH_MINUTES=$$((left / 60)).$$((left % 60 * 10 / 60)); bench=$$?; \
	exit $$((tests ? tests : bench))

# Warnings are no errors there: the versions are whatever the machine has.
gpu-tests:
	GPU_TEST_MINUTES=$(GPU_TEST_MINUTES) $(GPU_PYTHON) -m pytest -m gpu -W default -q tests/backends/test_cuda.py tests/hf/test_caches_cuda.py $(TEST_ARGS)

# Goes on where an earlier run with the same code, machine and versions stopped; BENCH_ARGS=--no-missing begins anew.
gpu-bench: BENCH_MINUTES ?= $(GPU_MINUTES)
gpu-bench:
	$(GPU_PYTHON) -u -m benchmarks --device cuda --missing --minutes $(BENCH_MINUTES) $(BENCH_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BENCH_READY)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
