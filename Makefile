# Everything a contributor or a CI machine runs. `make` alone lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRA  := cpu
PINS   := requirements/$(EXTRA).txt
PIP    := $(BIN)/python -m pip install --quiet --no-deps

# Where pip finds no CPU build of torch as it is configured, torch alone is asked for once more, from the
# PyTorch project's own index. Always naming that index would cost retries per package where it is unreachable.
TORCH       := $(shell grep '^torch==' $(PINS))
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help packages setup quickstart test test-unit test-gpu check lint format bench docs lock clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Make .venv with everything pinned (once); EXTRA=gpu: for NVIDIA GPUs

$(STAMP): $(VENV)/.packages pyproject.toml
	$(PIP) --editable .
	touch $@
	@echo "$(VENV) is ready; for searchrl on your PATH: . $(BIN)/activate"

packages: $(VENV)/.packages

$(VENV)/.packages: $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "searchrl needs Python 3.11 or newer; name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(PINS) into $(VENV): some minutes, silent"
	$(PIP) $(TORCH) || { test $(EXTRA) = cpu && $(PIP) $(TORCH) --extra-index-url $(TORCH_INDEX); }
	$(PIP) --requirement $(PINS)
	touch $@

quickstart: setup  ## Train SmolLM2-135M to search, on the CPU, in minutes; ARGS='seed=1' adds overrides
	$(BIN)/searchrl data worldfacts
	$(BIN)/searchrl train +experiment=quickstart name=quickstart-$$(date +%Y%m%d-%H%M%S) $(ARGS)

# In two processes; integration tests start others, which take about 3 GiB each.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

test: setup  ## Run unit tests, then integration tests; one summary at the end
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu"

test-unit: setup  ## Run the unit tests only (about six minutes on two cores)
	$(BIN)/python -m pytest $(PARALLEL) -m "not integration and not gpu"

test-gpu: setup  ## Run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

lint: setup  ## Check format, rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup  ## Rewrite files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test  ## Everything CI runs: lint, then all tests

bench:  ## List the measurements and how to run them
	@for file in $(wildcard benchmarks/*.py benchmarks/*/*.py); do echo "  $(BIN)/python $$file --help"; done
	@echo "results: benchmarks/RESULTS.md"

docs: setup  ## Build the documentation as a site into build/docs; a broken link is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

LOCK := uv pip compile pyproject.toml --extra dev --python-version 3.11 --upgrade \
  --no-emit-find-links --no-emit-index-url --no-header --no-annotate

lock:  ## Renew requirements/*.txt from pyproject.toml (needs uv; find torch through UV_FIND_LINKS or UV_INDEX)
	$(LOCK) --extra cpu --output-file requirements/cpu.txt
	$(LOCK) --extra gpu --universal --output-file requirements/gpu.txt

clean:  ## Remove caches and build output; keeps .venv, assets and runs
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
