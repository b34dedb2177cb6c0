# make demo, make test: each makes .venv, installs what it needs, and runs. A second call is quick.

PYTHON ?= python3
VENV ?= .venv
# Further arguments of pytest, such as ARGS="tests/test_cli.py -k resume".
ARGS ?=

BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.installed-demo
	$(BIN)/evalp-fast demo --progress

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --durations=10 $(ARGS)

# pyright does not read setuptools' mapping of evalp_fast.kernels to kernels/: it is shown a link.
lint: $(VENV)/.installed-dev
	@mkdir -p build/types/evalp_fast
	@ln -sfn ../../../kernels build/types/evalp_fast/kernels
	@ln -sfn ../../../evalp_fast/__init__.py build/types/evalp_fast/__init__.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# An interpreter that lies in .venv already is kept.
$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { \
	  echo "evalp_fast needs Python 3.10 or newer, and $(PYTHON) is not on the path:" \
	    "install it, or name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "evalp_fast needs Python 3.10 or newer, $(PYTHON) is" \
	    "$$($(PYTHON) -c 'import platform; print(platform.python_version())'):" \
	    "name a newer one: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment:" \
	    "install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }

# One stamp per extra: reinstalled when pyproject.toml is newer than it.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[$*]'
	@touch $@

# dev holds all that demo needs.
$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed-demo

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
