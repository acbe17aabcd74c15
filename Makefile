# The environment: Python 3.11 or later, everything under the tested versions of tests/constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOWEST := $(VENV)/lowest
TRAINER_TESTS := $(addprefix tests/test_,trainer.py trainer_loss.py trainer_saving.py resume.py auto.py arguments.py ess.py accelerate.py)
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-lowest test-slow test-vllm lint format clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(READY): pyproject.toml tests/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint tests/constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable ".[peft,recipes]" --group test --group lint
	touch $(READY)

demo: $(READY) ## Train a small GPT-2 with AdamW and with IVON, offline, and show the result
	$(BIN)/python recipes/demo.py --output_dir demo

test: $(READY) ## Run the test suite, except what is marked slow
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu"

$(LOWEST)/.ready: $(READY) tests/lowest.txt
	$(BIN)/python -m pip install --quiet --upgrade --target $(LOWEST) --no-deps --requirement tests/lowest.txt
	touch $@

test-lowest: $(LOWEST)/.ready ## Run the Trainer's tests with the oldest Transformers that is supported
	PYTHONPATH=$(CURDIR)/$(LOWEST) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu" $(TRAINER_TESTS)

test-slow: $(READY) ## Run the tests that are marked slow
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) -m "slow and not gpu"

test-vllm: $(READY) ## Serve merges by vLLM: make test-vllm VLLM_PYTHON=...
	@test -n "$(VLLM_PYTHON)" || { echo "VLLM_PYTHON must name a Python with vLLM, which needs an environment of its own"; exit 2; }
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_vllm.py --vllm-python $(abspath $(VLLM_PYTHON))

lint: $(READY) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and the demo's output
	rm -rf $(VENV) demo
