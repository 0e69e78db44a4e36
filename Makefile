# Everything starts from a clone: each target creates .venv itself, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of torch, first and by itself: resolved with the rest it may bring a CUDA build.
# Python compiles what it imports; to compile all of torch beforehand takes longer than to install it.
# It must keep what it compiled, or every process of every test compiles it again.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	--constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu check docs wheel wheel-cuda format clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 12

$(VENV)/torch: constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml setup.py
	BLIP3O_FAST_CUDA=0 $(INSTALL) --editable '.[demo]'
	touch $@

$(VENV)/dev: $(VENV)/demo
	BLIP3O_FAST_CUDA=0 $(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps foolbox
	touch $@

demo: $(VENV)/demo ## real photos to a trained translator and its report in ./demo
	$(BIN)/blip3o-fast demo --output_dir demo

test: $(VENV)/dev ## the tests that need no GPU, Triton kernels in its interpreter
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

test-slow: $(VENV)/dev ## the tests that take long: kill tests, packaging
	$(BIN)/python -m pytest -m slow

test-gpu: ## the tests that need a GPU, with the Python that has its torch
	$(PYTHON) -m pytest -m gpu

check: $(VENV)/dev ## lint, format, types, layering, documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	PYTHONPATH=.:kernels $(BIN)/lint-imports
	$(BIN)/python benchmarks/render.py --check

docs: $(VENV)/dev ## the documents as a site in ./site, links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/dev ## a wheel for every platform and the sdist, in ./dist
	BLIP3O_FAST_CUDA=0 $(BIN)/python -m build

wheel-cuda: $(VENV)/dev ## a wheel with the CUDA kernels, in ./dist; needs nvcc
	BLIP3O_FAST_CUDA=1 $(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

format: $(VENV)/dev ## mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the targets above made
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis demo
