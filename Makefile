# Targets are the habits; CI calls the same ones. `make demo` and `make test` work on a fresh machine.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TORCH  := torch>=2.13,<2.14
COVERED := $(if $(COVERAGE),--cov --cov-report=)

.PHONY: install demo notebooks test lint format typecheck docs compat bench bench-quick clean

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and by itself: a range that names no build lets pip choose gigabytes of CUDA
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(STAMP)

demo: install
	$(BIN)/python -m examples.demo $(if $(CHECK),--check)

# side by side on one thread each: two of torch on each core would wait for one another;
# servers have the machine to themselves: their tests look at the clock
test: install
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit tests/contract --numprocesses=auto --dist=loadfile $(COVERED)
	$(BIN)/python -m pytest tests/server $(if $(COVERAGE),$(COVERED) --cov-append --cov-report=term-missing:skip-covered)
endif

notebooks: install
	$(BIN)/python -m examples.build_models
	$(BIN)/python notebooks/run.py $(if $(CHECK),--check)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: install
	$(BIN)/mypy

docs: install
	$(BIN)/python -m docs.generate

compat: install
	$(BIN)/python -m tests.compat $(ARGS)

# all suites, or SUITE="foundation versus"
bench: install
	$(BIN)/python -m pip install --quiet -e ".[bench]"
	$(BIN)/python -m benchmarks $(SUITE) --write docs/benchmarks $(ARGS)

bench-quick: install
	$(BIN)/python -m benchmarks $(or $(SUITE),versus) --quick $(ARGS)

clean:
	rm -rf $(VENV) .venv-peer models build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
