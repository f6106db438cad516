# The commands of this project. Each sets up what it needs: .venv with pinned packages, and the native module, rebuilt when its
# sources change. `make` alone lists them.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --quiet install

# A build for other GPUs is another build.
BUILT := $(VENV)/.built-$(shell printf '%s' '$(VTOK_FAST_CUDA_ARCHS)' | tr -c 'A-Za-z0-9' '_')
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

# As many processes as there are cores, each of one thread; one that is done takes tests from the others.
TESTS := $(RUN) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
SEED := $(or $(SEED),$(shell od -An -N3 -tu4 /dev/urandom | tr -d ' '))

VIDEO ?=
WHEELS ?=
CONFIG ?=
CHECKPOINT ?=
DEMO_OPTIONS = $(if $(VIDEO),--video '$(VIDEO)') $(if $(CONFIG),--config '$(CONFIG)') $(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all bench wheels hub setup needs clean lint docs gallery coverage sanitize fuzz oldest-triton

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  make demo VIDEO=my.mp4 CONFIG=fsq_causal_488_32768 CHECKPOINT=vidtok_fsq_causal_488_32768.ckpt"
	@echo "  make test PYTHON=/usr/bin/python3.12      (which Python .venv is made from)"
	@echo "  make wheels WHEELS='--family cpu'          (scripts/wheels.py --help)"

demo: setup $(if $(VIDEO),,data/bikes.mp4) ## a real clip through VidTok, plain and accelerated; the result is in demo/
	@$(RUN) -m vtok_fast.cli demo --force $(DEMO_OPTIONS)

test: setup ## the tests, but for the slow ones
	@$(TESTS) -m "not slow"

test-all: setup oldest-triton ## every test, on random examples; SEED=123 repeats those of a run
	@echo "Random examples of seed $(SEED): make test-all SEED=$(SEED) repeats them"
	@VTOK_FAST_TEST_SEED=$(SEED) $(TESTS)

bench: setup ## each op beside its strongest peers; results go to benchmarks/results
	@$(RUN) -m vtok_fast.cli bench --output benchmarks/results

lint: setup $(VENV)/.tools ## ruff, mypy and clang-format, which change nothing
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .
	@git ls-files csrc tests/emulator | grep -E '\.(cpp|h|cu|cuh)$$' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	@$(RUN) -m mypy

wheels: needs ## wheels for CPUs and for families of GPUs, each tried in a fresh environment
	@$(PYTHON) scripts/wheels.py $(WHEELS)

hub: setup ## the ops as a repository for Hugging Face's kernels, in build/hub
	@$(RUN) scripts/hub.py

docs: setup $(VENV)/.tools ## the documentation, as a site in site/, looked at by a browser where there is one
	@$(RUN) scripts/docs.py
	@$(RUN) -m mkdocs build --quiet --strict
	@$(RUN) scripts/check_site.py site build/screenshots
	@echo "site/index.html"

gallery: setup ## the pictures of docs/gallery.md
	@$(RUN) scripts/gallery.py

coverage: setup $(VENV)/.tools ## which lines the fast tests reach; details in htmlcov/
	@$(TESTS) -m "not slow" --cov --cov-report=term:skip-covered --cov-report=html

sanitize: setup ## the CPU kernels' tests on a build with ASan and UBSan
	@scripts/sanitize.sh tests

fuzz: setup ## nonsense for the native module and the readers; SECONDS=600 each
	@scripts/sanitize.sh fuzz $(or $(SECONDS),600)

setup: $(BUILT) ## .venv, the packages and the native module

# The Triton of the oldest torch that pyproject.toml promises: every kernel must compile with it, too.
oldest-triton: setup ## fetches it (700 MB) for tests/ops/test_triton_compilation.py
	@[ -d $(VENV)/.triton-3.2.0 ] || $(PIP) --no-deps --target $(VENV)/.triton-3.2.0 triton==3.2.0

clean: ## remove what was built and written, except .venv and data
	@rm -rf build dist demo *.egg-info .pytest_cache .benchmarks .hypothesis vtok_fast/_C*.so $(VENV)/.built-*
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# One line names the Debian package that is missing, before anything else happens.
needs:
	@missing() { echo "missing: $$1. Install it: apt install $$2"; exit 1; }; \
	command -v git >/dev/null || missing git git; \
	command -v g++ >/dev/null || missing "g++ (the C++ compiler)" g++; \
	command -v $(PYTHON) >/dev/null || missing $(PYTHON) python3; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || missing "Python 3.10 or newer ($(PYTHON) is older)" python3; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing "Python's module venv" python3-venv; \
	$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' \
	  || missing "Python.h (Python's headers)" python3-dev

$(VENV)/.created: | needs
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: requirements-dev.txt $(VENV)/.created
	@echo "Installing the packages of requirements-dev.txt (torch is large: some minutes)"
	@$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)/.tools: requirements-tools.txt $(VENV)/.installed
	@echo "Installing the packages of requirements-tools.txt"
	@$(PIP) -r requirements-tools.txt
	@touch $@

$(BUILT): $(SOURCES) $(VENV)/.installed
	@echo "Building the native module"
	@$(PIP) --no-deps --editable .
	@rm -f $(VENV)/.built-*
	@touch $@

data/bikes.mp4: vtok_fast/commands/clips.py | $(BUILT)
	@$(RUN) -m vtok_fast.commands.clips data
	@touch $@
