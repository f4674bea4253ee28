# Each target does its own set-up in a virtual environment; a second call finds it done.
#
#   make demo       build pebble's bundle, ask it five questions
#   make test       the tests of every commit
#   make test-all   all tests, then the tables of the families and of the engines
#
# PyTorch's default wheels for Linux bring several GB of CUDA. To get the CPU build:
#   make demo TORCH_INDEX=<URL of PyTorch's CPU wheel index>

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
TORCH := torch==2.13.0
# What a commit runs: everything but slow tests and those that need the pretrained parts.
PER_COMMIT := not slow and not parts

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps

.PHONY: demo test test-all families engines engines-pebble lint types docs docs-check clean

demo: $(STAMPS)/demo
	$(BIN)/edge-safe demo

test: $(STAMPS)/dev
	$(BIN)/python -m pytest -q -m "$(PER_COMMIT)"

test-all: $(STAMPS)/dev
	$(BIN)/python -m pytest -q
	$(MAKE) --no-print-directory families
	$(MAKE) --no-print-directory engines

# A cell that was measured on the same code is not measured again.
families: $(STAMPS)/dev
	$(BIN)/python -m benchmarks.families --out build/families --page docs/families.md

engines: $(STAMPS)/dev
	$(BIN)/python -m benchmarks.engines --out build/engines --page docs/engines.md

# Pebble's alone, for three GPUs, as every commit builds them; fetches the pretrained parts.
engines-pebble: $(STAMPS)/dev
	$(BIN)/python -m benchmarks.engines --out build/engines --family models/pebble

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMPS)/dev
	$(BIN)/mypy

docs: $(STAMPS)/dev
	$(BIN)/python docs/generate_cli.py docs/cli.md

docs-check: $(STAMPS)/dev
	$(BIN)/python docs/generate_cli.py --check docs/cli.md

clean:
	rm -rf $(VENV) build dist *.egg-info

$(STAMPS)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "export and training need Python 3.11 to 3.13: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/demo: $(STAMPS)/torch pyproject.toml
	$(PIP) install --quiet --editable '.[cpu,export]'
	@touch $@

$(STAMPS)/dev: $(STAMPS)/torch pyproject.toml
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@
