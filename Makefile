# `make quickstart` and `make test` do everything on a fresh machine, the environment included.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
export OMP_NUM_THREADS = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup quickstart test lint format

setup: $(VENV)/.installed

# torch goes first and alone: nothing else may choose another build of it.
$(VENV)/.installed: requirements.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

quickstart: setup
	rm -rf $(RUN)
	$(BIN)/bpdg task arithmetic $(RUN)/task
	$(BIN)/bpdg train examples/quickstart/teacher.yaml
	$(BIN)/bpdg train examples/quickstart/student.yaml
	$(BIN)/bpdg train examples/quickstart/opd.yaml
	$(BIN)/bpdg train examples/quickstart/opd_sampled_token.yaml
	$(BIN)/bpdg report $(RUN)/opd --compare $(RUN)/opd_sampled_token

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
