# Every target makes its own virtual environment; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
# A release that pip finds as a CPU build where one is offered; TORCH=torch takes the index's newest.
TORCH ?= torch==2.13.0
BIN := .venv/bin
BEHAVIOUR := $(addprefix tests/test_,reference.py numeric.py swap.py parity.py launch.py state.py step.py traps.py)

.PHONY: demo test test-clients lint bench gpu-report clean

.venv/.ready: setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

.venv/.clients: .venv/.ready
	$(BIN)/pip install --quiet "$(TORCH)" --editable ".[clients]"
	touch $@

demo: .venv/.ready
	$(BIN)/python benchmarks/convergence.py

# The second run has the reference back end alone: the tests of behaviour, once more.
test: .venv/.ready lint
	$(BIN)/python -m pytest -n auto
	$(BIN)/python -m pytest -n auto --only-backend torch $(BEHAVIOUR)

# transformers.Trainer, accelerate and Lightning themselves, which only these tests need.
test-clients: .venv/.clients
	$(BIN)/python -m pytest -n auto tests/clients

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.ready
	$(BIN)/python benchmarks/overhead.py

# What the GPU kernels' machine code is made of, into benchmarks/results; needs no GPU.
gpu-report: .venv/.ready
	$(BIN)/python benchmarks/gpu_report.py

clean:
	rm -rf .venv build dist *.egg-info
