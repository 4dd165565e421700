# `make run` trains a demo cell, `make test` passes the tests; both build .venv/ first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
THREADS := OMP_NUM_THREADS=1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup run data sweep check test test-all test-gpu lint clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml .ci/constraints.txt
	@echo "Building $(VENV)/ (about two and a half minutes, 2.6 GB) …"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --constraint .ci/constraints.txt torch
	@$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable '.[dev]'
	@touch $@

setup: $(INSTALLED)  ## build the environment in .venv/

run: $(INSTALLED)  ## train AdaMRA on ListOps at the demo budget, from nothing to a leaderboard row
	$(BIN)/python run.py attention=adamra task=listops budget=demo

data: $(INSTALLED)  ## prepare what can be had without the internet, and list it
	$(BIN)/python scripts/prepare.py

sweep: $(INSTALLED)  ## a small grid without a GPU: softmax, adamra, lln on two tasks, two seeds; tables in results/sweep
	@# A cell that failed is in the tables too.
	$(BIN)/python run.py -m attention=softmax,adamra,lln task=listops,pathfinder seed=0,1 budget=sweep \
		results_dir=results/sweep data.root=results/data; \
	code=$$?; $(BIN)/python scripts/report.py results/sweep && exit $$code

check: $(INSTALLED)  ## attention=NAME: the contract's tests of one attention, and its time beside exact attention
	@$(THREADS) $(BIN)/python scripts/check.py $(or $(attention),--help)

test: $(INSTALLED)  ## the tests, without the slow ones
	$(THREADS) $(BIN)/pytest -n auto -m 'not slow'

test-all: test  ## those, then the slow ones: minutes; nothing runs twice in one call of make
	$(THREADS) $(BIN)/pytest -n auto -m slow

# The tests that need a GPU, and their output in a file. `make test-gpu PYTHON=python3` installs nothing and takes that
# Python as it is, for machines where everything is there already.
ifeq ($(origin PYTHON),command line)
GPU_PYTHON := $(PYTHON)
else
GPU_PYTHON := $(BIN)/python
test-gpu: $(INSTALLED)
endif
GPU_OUTPUT ?= results/test-gpu.txt
# Processes on one card: most of the time goes into compiling, and the tests of one attention stay in one process. Each
# would start a pool of compilers of its own, as large as the machine.
GPU_WORKERS ?= 8
COMPILERS := TORCHINDUCTOR_COMPILE_THREADS=2

test-gpu: SHELL := /bin/bash
test-gpu: .SHELLFLAGS := -o pipefail -c
test-gpu:  ## the tests that need a GPU; output in results/test-gpu.txt
	@mkdir -p $(dir $(GPU_OUTPUT))
	$(THREADS) $(COMPILERS) $(GPU_PYTHON) -m pytest -n $(GPU_WORKERS) --dist loadgroup -m gpu --durations=10 2>&1 | tee $(GPU_OUTPUT)

lint: $(INSTALLED)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:  ## remove the environment and caches, keep results/
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
