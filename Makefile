# `make run` is the main job on the embedded default, `make check` what to run before a commit, and `make check
# integration` the whole gate.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: run check integration install format lint types unit slow gpu docs bench clean

run: install
	$(BIN)/bellwether run

# Types are checked beside the tests: on one core alone, the other would have nothing to do.
check: lint
	$(MAKE) --jobs=2 types unit

install: $(STAMP)

# The stamp makes the second call quick and free of network.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

unit: install
	$(BIN)/pytest -n 2 --dist loadgroup -m "not integration and not slow and not gpu"

integration: install
	$(BIN)/pytest -n 2 --dist loadgroup -m "integration and not slow and not gpu"

# A link, anchor, page or name that is not there is an error.
docs: install
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --conf-dir docs/site --doctree-dir build/doctrees . build/docs
	@echo "The documentation stands in build/docs/index.html."

slow: install
	$(BIN)/pytest -m slow

gpu: install
	$(BIN)/pytest -m gpu

# How fast rounds are, beside other ways and beside the floor: hours on two cores; benchmarks/README.md says how to
# measure parts.
bench: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache
