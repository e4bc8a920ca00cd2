# Everything happens in this directory: the virtual environment in .venv, the build in target. Nothing is installed on the system.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
PROFILE ?= release
PYTEST_ARGS ?=
# A database that is given is one for all: tests look at all that goes on there.
WORKERS ?= $(if $(FASTQ_TEST_DSN),0,3)
BENCH_ARGS ?=
FAULT_REPEATS ?= 20
STATEFUL_STEPS ?= 5000
GUARDS ?=
CHAOS_SECONDS ?= 1800
CHAOS_SEED ?=
# The last commit of the first schema step.
UPGRADE_FROM ?= b95f37d0458c5133f7fcb354a610ccd948fc41ad

bin := $(VENV)/bin
python := $(bin)/python

# Stamps: a target runs again only when what it is made from has changed.
dependencies := $(VENV)/.dependencies
extension := $(VENV)/.extension.$(PROFILE)
python_dirs := $(wildcard python tests benches)

# One interpreter for every build, or PyO3 is compiled anew for each that is found.
export PYO3_PYTHON := $(abspath $(python))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_QUIET := 1

.PHONY: help
help: ## Show this list
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nVariables: PYTHON=%s VENV=%s PROFILE=%s (fastdev builds faster) WORKERS=%s PYTEST_ARGS= BENCH_ARGS= FAULT_REPEATS=%s GUARDS= CHAOS_SECONDS=%s CHAOS_SEED= UPGRADE_FROM=\n' \
		'$(PYTHON)' '$(VENV)' '$(PROFILE)' '$(WORKERS)' '$(FAULT_REPEATS)' '$(CHAOS_SECONDS)'

##@ Use it

.PHONY: setup
setup: $(extension) ## Make .venv and build the engine into it

.PHONY: demo
demo: setup ## Run 200,000 tasks through two workers, kill one, count what became of each
	$(bin)/fastq demo

.PHONY: bench
bench: setup ## Measure the README's whole table
	$(python) -m benches.table $(BENCH_ARGS)

##@ Work on it

.PHONY: check
check: lint test ## Everything that CI asks for: lint, then test

.PHONY: test
test: test-rust test-python ## Run all tests

.PHONY: test-rust
test-rust: ## Test the engine alone, with no Python in it
	cargo test --locked

.PHONY: test-python
test-python: setup ## Run pytest in WORKERS processes (0: in one, with a debugger); PYTEST_ARGS="-k name" picks
	$(python) -m pytest -n $(WORKERS) --dist worksteal --benchmark-disable$(if $(PYTEST_ARGS), $(PYTEST_ARGS))

.PHONY: faults
faults: setup ## Force every fault at default settings, each race FAULT_REPEATS times
	FASTQ_FAULT_REPEATS=$(FAULT_REPEATS) $(python) -m pytest tests/faults $(PYTEST_ARGS)

.PHONY: chaos
chaos: setup ## Everything that goes wrong, at once, for CHAOS_SECONDS; then account for every task
	CHAOS_SECONDS=$(CHAOS_SECONDS) CHAOS_SEED=$(CHAOS_SEED) $(python) -m tests.chaos.run

.PHONY: upgrade
upgrade: setup ## Let workers of UPGRADE_FROM go on under load while the schema is migrated and new ones join
	UPGRADE_FROM=$(UPGRADE_FROM) $(python) -m tests.upgrade.run

.PHONY: stateful
stateful: setup ## Run the whole queue beside a plain model for STATEFUL_STEPS steps
	FASTQ_STATEFUL_STEPS=$(STATEFUL_STEPS) $(python) -m pytest tests/acceptance/test_stateful.py $(PYTEST_ARGS)

.PHONY: guards
guards: setup ## Take each guard out of the engine and see its test fail; GUARDS="lease" picks
	$(python) -m tests.faults.guards $(GUARDS)

.PHONY: lint
lint: lint-rust lint-python ## Check formats, lints, types, imports and the stub

.PHONY: lint-rust
lint-rust: $(dependencies)
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --all-targets --features python -- -D warnings

.PHONY: lint-python
lint-python: setup
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy $(python_dirs)
	$(bin)/lint-imports --no-logo
	MYPYPATH=python $(python) -m mypy.stubtest --mypy-config-file pyproject.toml fastq._core

.PHONY: format
format: $(dependencies) ## Format Rust and Python, and fix what can be fixed
	cargo fmt
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

.PHONY: wheel
wheel: $(dependencies) ## Build a wheel into dist/
	$(bin)/maturin build --release --locked --out dist

.PHONY: clean
clean: ## Remove what was made here: .venv, target, dist, caches
	rm -rf $(VENV) target dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	rm -f python/fastq/_core*.so

$(dependencies): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"fastq needs Python 3.11 or newer, and $(PYTHON) is {sys.version.split()[0]}: make PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(python) -m pip install --upgrade 'pip>=25.1'
	$(python) -m pip install --group dev
	@touch $@

# maturin installs what the package itself depends on; it stops where two environments are active, hence the `env`.
$(extension): $(dependencies) Cargo.toml Cargo.lock README.md $(shell find build.rs rust sql 2>/dev/null)
	env -u CONDA_PREFIX VIRTUAL_ENV='$(abspath $(VENV))' $(bin)/maturin develop --locked --profile $(PROFILE) --extras embedded
	@rm -f $(VENV)/.extension.*
	@touch $@
