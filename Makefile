# deltaops: every target sets itself up. `make help` lists them.
#
# PYTHON=…   the interpreter to build the environment from (3.11 to 3.13)
# VENV=…     where the environment lives (.venv)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Triton beside a CPU build of torch, which brings none: the version the kernels are tested with.
TRITON := triton==3.6.0

# Shims (pyenv) may be there and fail, so each candidate is run, not looked up.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$p && break; done)

NATIVE := $(shell find csrc buildtools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.py' -o -name '*.json')

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 14

# jax before deltaops: the build reads jaxlib's headers where they are installed.
$(STAMP): pyproject.toml constraints.txt setup.py $(NATIVE)
	@test -n "$(PYTHON)" || { echo "deltaops needs Python 3.11 to 3.13 and none was found. Install one, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@command -v "$${CXX:-g++}" >/dev/null || { echo "deltaops needs a C++ compiler and $${CXX:-g++} was not found. Install one (apt-get install g++), or name it: make CXX=…"; exit 1; }
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet -c constraints.txt torch jax
	$(RUN)/python -c 'import triton' 2>/dev/null || $(RUN)/python -m pip install --quiet $(TRITON)
	$(RUN)/python -m pip install --quiet -c constraints.txt -e '.[dev,data]'
	touch $@

.PHONY: install
install: $(STAMP) ## the environment alone

.PHONY: demo
demo: $(STAMP) ## train, delta-tune and time a small language model (three minutes, no network)
	$(RUN)/deltaops demo

.PHONY: test
# Not `python -m pytest`: that puts this folder on the path, where transformers would find kernels/
# and take it for Hugging Face's package.
test: $(STAMP) ## the whole test suite
	$(RUN)/pytest

.PHONY: matrix
matrix: $(STAMP) ## every method on every architecture, every pair of them, by every property (long)
	$(RUN)/pytest --everything tests/methods/test_contract.py tests/methods/test_training.py \
		tests/methods/test_distributed.py tests/methods/test_defaults.py tests/methods/test_files.py \
		tests/methods/test_pairs.py tests/measure/test_gate.py tests/measure/test_ops_benchmark.py \
		tests/cli/test_commands.py

.PHONY: check
check: $(STAMP) ## format, lint, types, import rules: what CI runs besides the tests
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(RUN)/clang-format --dry-run -Werror
	$(RUN)/pytest -q tests/architecture

.PHONY: bench
bench: $(STAMP) ## measure this machine beside the peers: goals, JSON, report, pictures (20 minutes)
	$(RUN)/deltaops bench --out benchmarks/results

# A GPU machine has torch, triton, transformers, peft, pytest and nvcc, and no network: its own
# Python is used as it is.
GPU_SECONDS ?= 470
.PHONY: gpu
gpu: ## build, test and measure on a machine with a GPU and no network, in ten minutes or GPU_SECONDS
	-timeout 120 python3 -m pip install --quiet --no-build-isolation --no-deps -e .
	python3 -P tests/gpu.py benchmarks/results $(GPU_SECONDS)

.PHONY: clean
clean: ## remove what was built here
	rm -rf $(VENV) build *.egg-info deltaops/*.so
