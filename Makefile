# Each target works on a fresh machine with Python >= 3.11 and make: the environment makes itself.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

S3 ?= http://127.0.0.1:18336

.PHONY: help install demo test test-all test-browser test-chaos test-s3-real check bench pin results clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED)  ## make .venv with everything pinned in constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("hashray needs Python 3.11 or newer; set PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[cpu,dev]'
	@touch $@

demo: install  ## the whole pipeline on handwritten digits, about a minute, ends with a page
	$(BIN)/hashray demo --out demo-out

test: install  ## all tests but the slow ones and those of the search page
	$(BIN)/python -m pytest -m "not slow and not browser"

test-all: install  ## all tests
	$(BIN)/python -m pytest

test-browser: install  ## the search page in headless Chromium, which must be installed
	$(BIN)/python -m pytest tests/browser

test-chaos: install  ## every stage while nodes of a cluster on this machine come, go and die
	$(BIN)/python -m pytest -s tests/chaos

test-s3-real: install  ## S3 tests against a server: S3=http://host:port, its keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY
	HASHRAY_TEST_S3=$(S3) $(BIN)/python -m pytest tests/s3/test_storage.py tests/s3/test_index_s3.py tests/s3/test_pipeline_s3.py

check: install  ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/results.py --check

bench: install  ## side-by-side benchmarks, each printing a ratio
	for name in metric search encode train; do $(BIN)/python benchmarks/$$name.py || exit 1; done

pin: install  ## compile constraints.txt again: the tested set, both FAISS builds, no index addresses
	$(BIN)/uv pip compile --quiet --upgrade --no-header --no-annotate --no-emit-index-url --extra cpu --extra dev pyproject.toml -o constraints.txt
	sed -n 's/^faiss-cpu==/faiss-gpu==/p' constraints.txt >> constraints.txt

results: install  ## write docs/RESULTS.md and README.md's table from benchmarks/results/*.json
	$(BIN)/python benchmarks/results.py --write

clean:  ## remove what the targets above made
	rm -rf .venv demo-out demo-out-unlabelled .pytest_cache .mypy_cache .ruff_cache
