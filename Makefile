# `make demo` and `make test` need nothing but Python 3.11 or newer; everything lands in .venv.
# Another Python beside it: make VENV=.venv313 PYTHON=python3.13 test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
.PHONY: help demo test-fast test test-slow setup check fix bench clean docs

help:
	@echo "make demo    set up and run the main job: report in demo/report.html"
	@echo "make test-fast   after each edit: what goes through no run, no process and no picture"
	@echo "make test        all tests but the slow ones: before a commit"
	@echo "make test-slow   those: real Slurm and torchrun, memory, the wheel, all of Triton's kernels, the GPU check"
	@echo "make setup   set up only      make check   ruff and mypy      make fix   let ruff repair"
	@echo "make bench   time training and evaluation      make docs    this documentation as a site, in site/"

# torch comes first and alone: the pin selects one build, and nothing later replaces it
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("ropelab needs Python 3.11 or newer: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

setup: $(VENV)/installed-dev

demo: $(VENV)/installed
	$(BIN)/ropelab demo

# a process a core, with one thread each, so that they do not get into each other's way. Who is done takes over from the
# others; but slow tests of a file stay together, since what they start (a Slurm) is there once.
pytest = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8

test-fast: setup
	$(pytest) --dist worksteal -m 'not integration and not slow'

test: setup
	$(pytest) --dist worksteal -m 'not slow' --durations=15

test-slow: setup
	$(pytest) --dist loadfile -m slow --durations=15

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/ropelab bench train
	$(BIN)/ropelab bench eval
	$(BIN)/ropelab bench attention

.PHONY: docs
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python scripts/check_site.py site

clean:
	rm -rf $(VENV) demo dist build site *.egg-info
