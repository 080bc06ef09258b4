# Every target makes its own virtual environment; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
# A release that pip finds as a CPU build where one is offered; TORCH=torch takes the index's newest.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
VERSIONS ?= 2.11.0 2.13.0 2.14.1
BEHAVIOUR := $(addprefix tests/test_,reference.py numeric.py swap.py parity.py launch.py schedulers.py mode.py autograd.py \
    foreign_writes.py training_loop.py distributed_one_process.py) $(wildcard tests/test_state_*.py tests/test_step_*.py)

.PHONY: demo study results test test-versions test-clients lint docs mutants bench gpu gpu-report clean

$(VENV)/.ready: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/.clients: $(VENV)/.ready
	$(BIN)/pip install --quiet "$(TORCH)" --editable ".[clients]"
	touch $@

$(VENV)/.mutants: $(VENV)/.ready
	$(BIN)/pip install --quiet --editable ".[mutants]"
	touch $@

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python benchmarks/study/demo.py

# Hours; goes on where it was interrupted. STUDY="--help" tells the options.
study: $(VENV)/.ready
	$(BIN)/python benchmarks/study/study.py $(STUDY)

# The study's tables in README.md and docs/, and its plots, from the data that there are.
results: $(VENV)/.ready
	$(BIN)/python benchmarks/study/report.py

# The second run has the reference back end alone: the tests of behaviour, once more.
test: $(VENV)/.ready lint
	$(BIN)/python -m pytest -n auto
	$(BIN)/python -m pytest -n auto --only-backend torch $(BEHAVIOUR)

# The suite on several releases of torch, each in an environment of its own.
test-versions:
	for version in $(VERSIONS); do $(MAKE) test VENV=.venvs/$$version TORCH=torch==$$version || exit 1; done

# transformers.Trainer, accelerate, Lightning and other optimizers themselves, which only these tests need.
test-clients: $(VENV)/.clients
	$(BIN)/python -m pytest -n auto tests/clients

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into site/; a link or reference that leads nowhere is an error.
docs: $(VENV)/.docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet --builder html docs site

# Small changes to the sources, one at a time, each of which a test has to notice; MUTANTS="--help" tells the options.
mutants: $(VENV)/.mutants
	$(BIN)/python tests/mutants.py $(MUTANTS)

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/overhead.py

# The tests and the benchmark of a machine with a GPU, in nine minutes at most, into benchmarks/results.
gpu: $(VENV)/.ready
	$(BIN)/python benchmarks/gpu.py

# What the GPU kernels' machine code is made of, into benchmarks/results; needs no GPU.
gpu-report: $(VENV)/.ready
	$(BIN)/python benchmarks/gpu_report.py

clean:
	rm -rf .venv .venvs build dist site *.egg-info
