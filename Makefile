# `make` alone lists the targets. Everything runs in .venv, which `make setup` makes once.
PYTHON := .venv/bin/python
READY := .venv/.ready
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test slow lint types check clean
help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 10

setup: $(READY)  ## make .venv: PyTorch, Megatron-Core and this package (about 5 GB)

# The stamp is written last, so an interrupted set-up starts anew.
$(READY): constraints.txt setup.py tools/setup_venv.sh tools/find_python.sh
	@sh tools/setup_venv.sh .venv
	@touch $(READY)

demo: $(READY)  ## distil a student that adds, on two ranks; ends with a table (15 minutes on 2 cores)
	@$(PYTHON) tools/demo.py

test: $(READY)  ## the whole test suite but the slow part
	@$(PYTHON) -m pytest

slow: $(READY)  ## the slow part of the test suite
	@$(PYTHON) -m pytest -m slow

lint: $(READY)  ## ruff: rules and formatting
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

types: $(READY)  ## mypy
	@$(PYTHON) -m mypy

check: lint types test  ## everything that has to pass before a commit lands

clean:  ## remove runs and caches, keep .venv
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
