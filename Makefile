# Each target starts from nothing: it makes the virtual environment, installs torch and compiles the
# extension as far as that is not done yet. `make test` and `make bench` are the two to know.

PYTHON ?= python3
VENV ?= .venv
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
# ninja is found here, where it compiles in parallel.
export PATH := $(abspath $(VENV)/bin):$(PATH)
COMPILED := setup.py pyproject.toml $(wildcard build_backend/*.py) $(shell find csrc -type f)
CXX_FORMATTED := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build lint format test test-gpu bench bench-full gpu clean

build: $(VENV)/.built

# A base interpreter that already has torch lends it to the environment: nothing is downloaded twice, and
# `make gpu` needs no network on a machine that has torch.
$(VENV)/.torch:
	site=$$($(PYTHON) -c 'import importlib.util as u; print("--system-site-packages" if u.find_spec("torch") else "")')
	$(PYTHON) -m venv $$site $(VENV)
	$(PY) -c 'import torch, setuptools' 2>/dev/null || $(PIP) install 'torch>=2.11' 'setuptools>=77' ninja
	touch $@

$(VENV)/.built: $(VENV)/.torch $(COMPILED)
	$(PIP) install --no-build-isolation --no-deps --editable .
	touch $@

# By name, so that pip reads the extras of the copy just installed and compiles nothing again.
$(VENV)/.extras: $(VENV)/.built
	$(PIP) install 'lora_ext[test,bench]'
	touch $@

$(VENV)/.tools: $(VENV)/.built
	$(PIP) install 'lora_ext[dev]'
	touch $@

lint: $(VENV)/.tools
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FORMATTED)
	$(PY) scripts/check_house.py

format: $(VENV)/.tools
	$(VENV)/bin/ruff check --fix-only
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CXX_FORMATTED)

test: $(VENV)/.extras
	$(PY) -m pytest $(ARGS)

test-gpu: $(VENV)/.extras
	$(PY) -m pytest -m gpu $(ARGS)

bench: $(VENV)/.extras
	$(PY) -m benchmarks $(ARGS)

bench-full: $(VENV)/.extras
	$(PY) -m benchmarks --full $(ARGS)

gpu: $(VENV)/.built
	$(PY) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info lora_ext/_C.*.so lora_ext/_build.json
