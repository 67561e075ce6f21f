# Two commands for users: `make train` and `make test`. Everything else is for developers.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CLIENTS := .venv-clients
ARGS   ?=

export PYTHONDONTWRITEBYTECODE := 1

# `make gpu PYTHON=...` runs that interpreter as it is; otherwise the one of the project's environment.
GPU_PYTHON := $(if $(filter command environment,$(firstword $(origin PYTHON))),$(PYTHON),$(BIN)/python)
DEVICE   ?= cuda
PACKAGES ?=

.PHONY: train test test-clients check soak gpu docs clean

$(STAMP): pyproject.toml constraints.txt
	@echo "installing the pinned packages into $(VENV) (once, a minute or two)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,plot]'
	@touch $@

train: $(STAMP)  ## train a small GPT on the Python standard library's source, ZeRO stage 2, two ranks
	@$(BIN)/python examples/train_gpt.py $(ARGS)

test: $(STAMP) check  ## everything: lint, types, architecture, unit and multi-process tests
	$(BIN)/python -m pytest tests/unit tests/architecture -m "process and not soak"
	$(BIN)/python -m pytest tests -m "not soak" --ignore=tests/unit --ignore=tests/architecture $(ARGS)
	ZEROPIPE_TRANSPORT=messages $(BIN)/python -m pytest tests/dist/test_comm_collectives.py \
		tests/dist/test_comm_faults.py tests/dist/test_data_parallel.py tests/dist/test_zero_gather.py \
		tests/dist/test_comm_agree.py tests/dist/test_meetings.py tests/dist/test_zero_two_hops.py \
		tests/faults/test_zero3_divergence.py

check: $(STAMP)  ## lint, types, architecture, pure unit tests: under a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest tests/unit tests/architecture -m "not process"

$(CLIENTS)/.installed: pyproject.toml constraints-clients.txt compat/deepspeed/pyproject.toml
	@echo "installing the pinned clients into $(CLIENTS) (once, a few minutes)"
	@test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/pip install -q --disable-pip-version-check -c constraints-clients.txt torch
	@$(CLIENTS)/bin/pip install -q --disable-pip-version-check -c constraints-clients.txt -e '.[test,clients]'
	@$(CLIENTS)/bin/pip install -q --disable-pip-version-check --no-deps --force-reinstall ./compat/deepspeed
	@touch $@

test-clients: $(CLIENTS)/.installed  ## Trainer, Accelerate, peft, TRL and Lightning on zeropipe, in their own environment
	$(CLIENTS)/bin/python -m pytest tests/clients $(ARGS)

gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(STAMP))  ## tests/gpu and the measurements on one GPU: eight minutes
	PYTHONPATH="src:.:$(PACKAGES)" $(GPU_PYTHON) -m benchmarks.gpu.run --device $(DEVICE) $(ARGS)

docs: $(STAMP)  ## the pages and the API reference as a site in build/docs
	@$(BIN)/python -m sphinx -q -W --keep-going docs build/docs
	@echo "open build/docs/index.html"

soak: $(STAMP)  ## the long tests
	$(BIN)/python -m pytest tests -m soak

clean:
	rm -rf $(VENV) $(CLIENTS) runs build
