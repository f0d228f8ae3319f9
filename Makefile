# Two commands: `make demo` and `make test`. Both set up .venv first where it is missing or out of date. `make` alone lists
# the targets: each is a line `target: what it needs  ## what it does`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: help demo test soak setup upgrade-check lint style types tests format clean

help:
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: $(READY)  ## MovieLens-100K from the raw ratings to a registered model
	$(BIN)/solar run movielens-100k

test: style  ## lint, types, import rules and all tests
	$(MAKE) --no-print-directory --jobs 2 types tests || { echo "failed: a test, or a type (see pyright's lines above)"; exit 1; }

# Two at a time on two cores: a third one makes ranks wait for each other at every collective. Hundreds of processes import
# the sources: compiled once, the tests are collected in 8 s instead of 13, for example.
tests: $(READY)
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Before a release, an hour or two on two cores: every command of the integration tests with Ray, as a user starts it,
# and then runs, ingests and a month of nights that are killed at random moments.
soak: $(READY)  ## before a release: long tests, an hour or two
	SOLAR_TEST_RAY=1 $(BIN)/python -m pytest tests/integration
	$(BIN)/python tests/benchmarks/kill_and_resume.py --kills 12
	$(BIN)/python tests/benchmarks/kill_and_prepare.py --kills 12
	$(BIN)/python tests/benchmarks/simulated_month.py --nights 30

lint: style types  ## style, types and import rules alone

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(READY)
	$(BIN)/pyright

format: $(READY)  ## source files in the style of the project
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)  ## .venv with all packages; EXTRA=gpu for a GPU, PYTHON=python3.11 for another Python

# torchrec last and without its dependencies: it asks for the CUDA build of fbgemm. EXTRA=gpu installs that build.
EXTRA ?= cpu
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] < (3, 14) else f"Python {v[0]}.{v[1]} is not 3.11, 3.12 or 3.13: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(sed -n 's/^pip = \["\(.*\)"\]/\1/p' pyproject.toml)"
	$(BIN)/pip install --quiet --editable '.[$(EXTRA)]' --group dev
	$(BIN)/pip install --quiet --no-deps --group torchrec
	touch $@

upgrade-check: $(READY)  ## the pinned packages of which newer versions are out
	@sed -n 's/^[^#]*"\([A-Za-z0-9_-]*\)\(\[[a-z,0-9]*\]\)\{0,1\}==.*/^\1 /p' pyproject.toml | sed 's/[-_]/[-_]/g' > .venv/pins
	@$(BIN)/pip list --outdated > .venv/outdated
	@sed -n 1,2p .venv/outdated; grep -if .venv/pins .venv/outdated || echo "every pin is the newest"

clean:  ## removes .venv and workspace
	rm -rf .venv workspace
