.DEFAULT_GOAL := help
.PHONY: help install run bench deploy-demo test test-slow check clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Caches of libraries stay inside the checkout; nobody is told that tests ran.
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/cache/matplotlib
export XDG_CACHE_HOME := $(CURDIR)/$(VENV)/cache
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_DISABLE_TELEMETRY := 1

help:  ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

install: $(STAMP)  ## create .venv with the pinned dependencies and this package, editable

run: $(STAMP)  ## train the default job: FedLoRU, 100 virtual clients on Flower and Ray
	$(BIN)/fedloru run

bench: $(STAMP)  ## measure speed against other ways to train the same clients (about an hour; ARGS="--only digits")
	$(BIN)/python -m benchmarks.bench $(ARGS)

deploy-demo: $(STAMP)  ## FedLoRU over TLS: one SuperLink and three SuperNodes with keys, on this machine
	$(BIN)/python examples/deploy/demo.py runs

test: $(STAMP)  ## run the default test tier (at most 10 minutes)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)  ## run the rest of the tests
	$(BIN)/python -m pytest -m slow

check: $(STAMP)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/deploy
	$(BIN)/mypy examples/llm-tiny

clean:  ## remove .venv, caches and build products (runs/ stays)
	rm -rf $(VENV) .venv-bench-pfl build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
