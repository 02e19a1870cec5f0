# `make demo` and `make test` need nothing but Python 3.11 or newer; everything lands in .venv.
# Another Python beside it: make VENV=.venv313 PYTHON=python3.13 test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
.PHONY: help demo test setup check fix bench clean

help:
	@echo "make demo    set up and run the main job: report in demo/report.html"
	@echo "make test    set up and run the tests"
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

# a process a core, a file at a time on each: with one thread, so that they do not get into each other's way
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

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
