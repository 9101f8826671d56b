# make demo and make test need nothing but Python 3.11 or newer.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: install demo test lint compatibility

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[training,export,test]'
	touch $@

demo: install
	$(BIN)/python -m training

test: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Hours on two cores; what is done stays done. Writes docs/compatibility.md.
compatibility: install
	$(BIN)/pip install --quiet keras-hub
	$(BIN)/python tests/compatibility.py
