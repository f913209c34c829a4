# A fresh clone needs python3 (3.11 or newer) and make; everything else is installed into .venv.
#
#   make demo     the main job on the embedded digits, ends with a report
#   make test     the tests
#   make          this list
#
# Variables: PYTHON=python3.12 chooses the interpreter, VENV another folder, JOBS the number of test
# processes, PIP_FLAGS extra words for pip (an index of one's own), PYTEST_FLAGS extra words for pytest.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PIP_FLAGS ?=
PYTEST_FLAGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS) -c constraints.txt

# One thread a process: more only compete with the test processes, and the numbers stay the same.
export OMP_NUM_THREADS ?= 1

.PHONY: help install demo test check format clean

help:
	@sed -n '3,5s/^# *//p' Makefile
	@echo 'make check    ruff, mypy and pyright'
	@echo 'make format   ruff, writing its corrections'
	@echo 'make clean    removes .venv and what the tools left behind; keeps runs/'

install: $(STAMP)

# The build runs in .venv itself (--no-build-isolation): a build environment of pip's own would ignore
# constraints.txt. What a build leaves in the root is removed: it grows old, and python -m, which looks
# there first, would take its entry points for those installed. The stamp comes last, so an interrupted
# installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'fedsim needs Python 3.11 or newer: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@echo 'installing into $(VENV): once, a few minutes'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation -e '.[dev]'
	@rm -rf *.egg-info
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/fedsim demo

test: $(STAMP)
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(PYTEST_FLAGS)

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
