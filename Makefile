# make quickstart   set up .venv once, then run the main job (ARGS="--fast" passes flags on)
# make test         set up if needed, then tests, lint, types, and documents against results
#
# Needs Python 3.11 or newer (PYTHON=python3.12 picks another), git and make.

PYTHON ?= python3
ARGS ?=
# Two workers: the machine this is sized for has two cores.
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.set-up
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: setup quickstart test tests lint types figures figures-check docs wheel clean
.DEFAULT_GOAL := quickstart

setup: $(STAMP)

# A second run finds the stamp newer than both files and does nothing.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is too old, Python 3.11 or newer is needed (make PYTHON=python3.12 …)" >&2; \
	  exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# Without an NVIDIA GPU on Linux, the CPU build of torch, if an index pip is set up with has it.
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
	  echo "no NVIDIA GPU found: looking for the CPU build of torch $(TORCH)"; \
	  $(BIN)/pip install -c constraints.txt "torch==$(TORCH)+cpu" >.venv/torch.log 2>&1 \
	  || { echo "pip's indexes do not have it (.venv/torch.log): taking the plain build, several"; \
	       echo "gigabytes. To avoid that, stop (Ctrl-C), add the index that PyTorch's install page"; \
	       echo "names for CPUs (pip config set global.extra-index-url …), and run make again."; }; \
	fi
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: $(STAMP)
	$(BIN)/promedical quickstart $(ARGS)

test: tests lint types figures-check

# worksteal gives each worker neighbouring tests, so that what a file sets up is mostly set up once.
tests: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

figures: $(STAMP)
	$(BIN)/python -m promedical.figures

figures-check: $(STAMP)
	$(BIN)/python -m promedical.figures --check

# The site, in site/: open site/index.html. NO_MKDOCS_2_WARNING hides an advertisement of the theme's.
docs: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
