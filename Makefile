# make demo and make test need nothing but Python 3.11 or newer.
PYTHON ?= python3
BIN = .venv/bin
# Warnings are errors in the tests, so versions are pinned. The newest of all instead:
# make install CONSTRAINTS=/dev/null
CONSTRAINTS ?= .ci/constraints.txt

.PHONY: install demo quick test lint docs guides speed compatibility

install: .venv/installed

.venv/installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[tensorflow]' \
	    --group training --group export --group docs --group test
	touch $@

demo: install
	$(BIN)/python -m training

# At most a minute on two cores that do nothing else: the library's tests that are not slow.
quick: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow" keras_cross_stitch tests/test_*.py

test: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# build/site/index.html, which is read without a server and without a network.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Minutes: the guides' outputs, anew.
guides: install
	TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python docs/run_guides.py

# Minutes, on a machine that does nothing else. Writes docs/speed.md. PYTORCH names a
# Python with PyTorch, where it is not installed here.
speed: install
	$(BIN)/python tests/speed.py $(PYTORCH)

# Hours on two cores; what is done stays done. Writes docs/compatibility.md.
compatibility: install
	$(BIN)/pip install --quiet keras-hub
	$(BIN)/python -m tests.compatibility
