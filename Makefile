# Every target sets up what it needs first (scripts/setup: a few minutes the first time, nothing after that).
# ARGS passes flags on: make test ARGS="-k wire -x", make test ARGS="-n 0" (in one process), make demo ARGS="--help".

PYTHON_IN_VENV := .venv/bin/python
.DEFAULT_GOAL := help
# Compiled modules are kept, whatever the environment says: the tests start hundreds of processes.
export PYTHONDONTWRITEBYTECODE :=
.PHONY: help setup demo test lint prove soak simulate fuzz clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup:  ## Make .venv and the demo model; every other target does this by itself
	@scripts/setup

demo: setup  ## Two engines, one conversation: watch KV stream from prefill to decode
	@$(PYTHON_IN_VENV) -m benchmarks.demo $(ARGS)

# A process of tests that dies is a failure, and isn't replaced: pytest-xdist 3.8 may then wait for ever.
test: setup  ## Run all tests
	@scripts/testtools
	@$(PYTHON_IN_VENV) -m pytest -n 3 --max-worker-restart 0 $(ARGS)

lint: setup  ## Style, types and layers
	@$(PYTHON_IN_VENV) -m ruff check .
	@$(PYTHON_IN_VENV) -m ruff format --check .
	@$(PYTHON_IN_VENV) -m mypy
	@PYTHONPATH=. .venv/bin/lint-imports

prove: setup  ## Measure every claim on this machine (5 hours; ARGS=--quick, ARGS=handoff)
	@$(PYTHON_IN_VENV) -m benchmarks.prove $(ARGS)

soak: setup  ## Run a pair under load and faults for a while (ARGS=--help)
	@$(PYTHON_IN_VENV) -m benchmarks.soak $(ARGS)

simulate: setup  ## A million handoffs with simulated faults at every step (25 minutes)
	@$(PYTHON_IN_VENV) -m benchmarks.simulate $(ARGS)

fuzz: setup  ## A million bent frames for every decoder (20 minutes; ARGS=--quick)
	@$(PYTHON_IN_VENV) -m benchmarks.fuzz $(ARGS)

clean:  ## Remove everything that these targets have made
	rm -rf .venv .cache build dist .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
