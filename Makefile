# Every command of the project. `make` alone lists them.
#
#   make demo PYTHON=python3.13         another Python (>= 3.11) for the environment
#   make install CONSTRAINTS=other.txt  other pinned versions
#   make install PIP_FLAGS='...'        anything else pip should know (README: CUDA, CPU-only wheels)
#   make test PYTEST_ARGS='-k runner'   a part of the tests
#   make bench BENCH_ARGS='demo-local'  a part of the benchmarks (`.venv/bin/e2e-sae bench --help`)
#
# The notebook demos/train_saes.ipynb opens in any Jupyter whose kernel is .venv (`make install-dev` brings ipykernel);
# one to go with it: .venv/bin/pip install jupyterlab && .venv/bin/jupyter lab demos

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install install-dev hooks demo test test-all test-smoke test-tl3 format check type bench clean

# The first Python >= 3.11 that runs (a pyenv shim may exist and still refuse).
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

VENV ?= .venv
VENV_TL3 ?= .venv-tl3
CONSTRAINTS ?= constraints.txt
PIP_FLAGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
# Test processes. Each runs torch on one thread: several threads on tiny tensors only cost time.
JOBS ?= 2

BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
SOURCES := e2e_sae tests benchmarks setup.py

# $(call make-venv,FOLDER): an empty virtual environment, or a clear message about the Python at hand.
define make-venv
	@if [ -z "$(PYTHON)" ]; then echo "error: no Python >= 3.11 found (python3 is $$(python3 --version 2>&1));" \
		"install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 2; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1 | tail -1), expected Python >= 3.11" >&2; exit 2; }
	@if [ ! -x $(1)/bin/pip ]; then echo "==> making $(1) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(1) || { \
		echo "error: '$(PYTHON) -m venv' failed (Debian and Ubuntu: install the package python3-venv)" >&2; exit 2; }; fi
endef

# $(call pip-install,FOLDER,CONSTRAINTS,REQUIREMENTS): one pip call, so that one resolution satisfies everything.
# Shown: downloads of a megabyte and more, and the final step; the rest of pip's talk is dropped, its errors are not.
define pip-install
	@echo "==> installing into $(1), versions from $(2) (some minutes the first time: torch is large)"
	@set -o pipefail; $(1)/bin/python -m pip install --disable-pip-version-check --progress-bar off $(PIP_FLAGS) \
		-c $(2) $(3) | awk '/Downloading .*MB\)/ {print "    " $$2, $$3, $$4; fflush()} \
		/^Installing collected/ {print "    unpacking", NF - 3, "packages ..."; fflush()}'
endef

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamps are newer than what they were installed from: a second `make` installs nothing.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(call make-venv,$(VENV))
	$(call pip-install,$(VENV),$(CONSTRAINTS),torch==2.13.0 -e .)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS)
	$(call make-venv,$(VENV))
	$(call pip-install,$(VENV),$(CONSTRAINTS),torch==2.13.0 -e '.[dev]')
	@$(MAKE) --no-print-directory hooks
	@touch $(VENV)/.installed $@

$(VENV_TL3)/.installed-dev: pyproject.toml constraints-tl3.txt
	$(call make-venv,$(VENV_TL3))
	$(call pip-install,$(VENV_TL3),constraints-tl3.txt,torch==2.13.0 transformer-lens==3.9.0 -e '.[dev]')
	@touch $@

install: $(VENV)/.installed ## the library in .venv, pinned versions

install-dev: $(VENV)/.installed-dev ## the same with test and lint tools

# For .venv only: other environments come and go, and the hook names its Python. Not being able to is no error.
hooks: ## run `make check` before each git commit (`make install-dev` does this)
	@if [ "$(VENV)" = .venv ] && [ -e .git ]; then \
		if git config --get core.hooksPath >/dev/null; then echo "note: core.hooksPath is set, no git hook installed"; \
		else $(BIN)/python -m pre_commit install || echo "note: no git hook installed"; fi; fi

demo: install ## train a local, an e2e and an e2e+ds SAE on the embedded model (about 3 minutes)
	@$(BIN)/e2e-sae demo

test: install-dev ## the default suite (at most 6 minutes on 2 cores)
	$(PYTEST) $(PYTEST_ARGS)

test-all: install-dev ## the default suite and the slow tests
	$(PYTEST) --runslow $(PYTEST_ARGS)

test-smoke: install-dev ## the slow tests that .ci/run includes
	$(PYTEST) --runslow -m smoke $(PYTEST_ARGS)

# What these test is the same on every version of TransformerLens.
TL3_LEFT_OUT := $(addprefix --ignore=tests/,ops data mlp_training analysis/interpret) \
	$(patsubst %,--ignore=tests/analysis/test_%.py,agreement_sentences bootstrap feature_html feature_pages_browser \
	geometry matching paper performance runs_wandb similarity)

test-tl3: $(VENV_TL3)/.installed-dev ## the suite on TransformerLens 3.9 (HookedTransformer), in its own environment
	@$(VENV_TL3)/bin/python -c "import importlib.metadata as m; v = m.version('transformer-lens'); \
		print('transformer-lens', v); raise SystemExit(not v.startswith('3.'))"
	OMP_NUM_THREADS=1 $(VENV_TL3)/bin/python -m pytest -n $(JOBS) --dist loadfile $(TL3_LEFT_OUT) $(PYTEST_ARGS)

format: install-dev ## repair formatting and what the linter can repair
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

type: install-dev ## types only
	$(BIN)/pyright --pythonpath $(BIN)/python

# Looks, never repairs. `-n 0 -p no:cacheprovider`: the layer test alone, in this process, leaving no files.
check: install-dev ## formatting, lint, types and import layers
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q -n 0 -p no:cacheprovider tests/test_layers.py

bench: install ## training steps beside the plain way (half an hour on 2 cores)
	$(BIN)/python -m benchmarks --memory $(BENCH_ARGS)

clean: ## remove environments, builds and caches (never out/)
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .coverage .coverage.* htmlcov
	find e2e_sae tests -name __pycache__ -type d -prune -exec rm -rf {} +
