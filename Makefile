# `make quickstart` and `make test` do everything on a fresh machine, the environment included.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
export OMP_NUM_THREADS = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup sglang quickstart quickstart-sglang test test-fast lint typecheck format

setup: $(VENV)/.installed

# torch goes first and alone: nothing else may choose another build of it.
$(VENV)/.installed: requirements.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# A real SGLang server for CPU, in an environment of its own: its packages and the trainer's do not agree.
sglang: .venv-sglang/.installed

.venv-sglang/.installed: tools/install_sglang_cpu.sh $(shell find tools/sglang_cpu -type f)
	PYTHON=$(PYTHON) tools/install_sglang_cpu.sh .venv-sglang

quickstart: setup
	rm -rf $(RUN)
	$(BIN)/bpdg task arithmetic $(RUN)/task
	$(BIN)/bpdg train examples/quickstart/teacher.yaml
	$(BIN)/bpdg train examples/quickstart/student.yaml
	$(BIN)/bpdg train examples/quickstart/opd.yaml
	$(BIN)/bpdg train examples/quickstart/opd_sampled_token.yaml
	$(BIN)/bpdg report $(RUN)/opd --compare $(RUN)/opd_sampled_token

# After `make quickstart`: its distillation again, with both models on SGLang servers.
quickstart-sglang: setup sglang
	rm -rf $(RUN)/opd_sglang
	PATH="$(CURDIR)/$(BIN):$$PATH" BPDG_SGLANG_PYTHON=.venv-sglang/bin/python examples/quickstart/serve.sh
	$(BIN)/bpdg report $(RUN)/opd_sglang --compare $(RUN)/opd

# Groups and their order are those of tests/conftest.py; xdist's own order would go by how many tests a group has.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup sglang
	$(PYTEST)

# Units and layouts, without servers, whole runs, and what is marked as slow.
test-fast: setup
	$(PYTEST) -m "not slow" tests/unit tests/parallel

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

typecheck: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
