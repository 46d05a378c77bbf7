# `make demo` and `make test` do all the set-up. They need only Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
FILES := clsa tests benchmarks
BENCHMARKS := input augment loss step scale
# Peers for comparison, never dependencies; installed without theirs, which would bring Lightning.
LIGHTLY := lightly lightly-utils lightning-utilities
PEERS := $(LIGHTLY) kornia kornia-rs

.PHONY: demo test check pytest format parity bench fault clean

demo: $(VENV)/ready
	$(BIN)/clsa demo

test: $(VENV)/ready-to-test check pytest

check: $(VENV)/ready-to-test
	$(BIN)/ruff format --check $(FILES)
	$(BIN)/ruff check $(FILES)
	$(BIN)/pyright --pythonpath $(BIN)/python

pytest: $(VENV)/ready-to-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses 2 --dist loadgroup --durations 5

format: $(VENV)/ready-to-test
	$(BIN)/ruff check --fix $(FILES)
	$(BIN)/ruff format $(FILES)

parity: $(VENV)/ready-to-test
	$(BIN)/python -m benchmarks.parity

# Up to 20 minutes on two idle cores; rewrites docs/benchmarks.md. If one benchmark fails, the others
# still run, and make fails at the end.
bench: $(VENV)/ready-to-bench
	failed=; for name in $(BENCHMARKS); do \
		$(BIN)/python -m benchmarks.$$name || failed="$$failed $$name"; done; \
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

# Checks that runs survive faults: one part (PART=A to D), 7 to 67 minutes; rewrites
# docs/reliability.md.
PART ?= A
fault: $(VENV)/ready-to-test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fault.part_$(shell echo $(PART) | tr A-F a-f) long --jobs 2

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("clsa needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/ready-to-test: $(VENV)/ready
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps $(LIGHTLY)
	touch $@

$(VENV)/ready-to-bench: $(VENV)/ready
	$(PIP) --no-deps $(PEERS)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
