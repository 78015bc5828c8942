# make demo   fine-tune a real model on this machine and talk to it before and after
# make test   the whole test suite
# make lint   style and formatting
# make deepspeed   two processes under DeepSpeed, which it installs in .venv/deepspeed
# make venv   only the Python environment, in .venv
#
# Needs git, make and Python 3.11 or newer with venv. PYTHON=... names another interpreter,
# PIP_ARGS=... is passed to pip (a mirror, for example).

SHELL := /bin/bash
NEW_ENOUGH := import sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && { echo $$p; break; }; done)
PIP_ARGS ?=
TESTS ?= tests
WORKERS ?= 2

BIN := .venv/bin
READY := .venv/.ready
PIP = $(BIN)/python -m pip install $(PIP_ARGS) --quiet --disable-pip-version-check

.PHONY: help demo test deepspeed lint format docs venv clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -8

demo: $(READY)
	$(BIN)/python scripts/demo.py

test: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

# In an environment of its own that sees the suite's packages: with DeepSpeed installed, transformers always loads it.
deepspeed: $(READY)
	test -x .venv/deepspeed/bin/python || $(BIN)/python -m venv .venv/deepspeed
	$(BIN)/python -c 'import site; print(*site.getsitepackages(), "$(CURDIR)/src", sep="\n")' > \
		"$$(.venv/deepspeed/bin/python -c 'import site; print(site.getsitepackages()[0])')/suite.pth"
	.venv/deepspeed/bin/python -m pip install $(PIP_ARGS) --quiet --disable-pip-version-check -r requirements/deepspeed.txt
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv/deepspeed/bin/python -m pytest tests/e2e/test_deepspeed.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages that are made from the code; a test says when they are stale.
docs: $(READY)
	$(BIN)/luthier schema --markdown > docs/keys.md
	$(BIN)/luthier schema --compatibility > docs/compatibility.md

venv: $(READY)

# torch comes first and alone, so that no other package's requirement picks its build.
$(READY): requirements/torch.txt requirements/ci.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Luthier needs Python 3.11 or newer with the venv module; none was found. Name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "Installing torch, then the rest, into .venv (once; about 2 GB)"
	$(PIP) -r requirements/torch.txt
	$(PIP) -r requirements/ci.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
