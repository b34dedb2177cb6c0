# make demo, make test, make bench: each makes .venv, installs what it needs, and runs. A second call is quick.
# make gpu: takes the python3 that is there, and installs nothing. That needs torch, triton, numpy, scipy, tqdm,
# safetensors, huggingface-hub and pytest; tyro, pytest-benchmark, nvidia-ml-py and matplotlib only add to it.

PYTHON ?= python3
VENV ?= .venv
# Further arguments of pytest, such as ARGS="tests/test_cli.py -k resume".
ARGS ?=
# Processes that make test runs in, a file of tests each: one for a core, and at most eight. Their threads wait
# without spinning, as they share the cores.
JOBS ?= $(shell nproc)

BIN := $(VENV)/bin

# Where the measurements go: RESULTS/device/date.json.
RESULTS ?= bench/results
RESULTS_PATH := $(abspath $(RESULTS))
# A folder of wheels of the peers (make wheels), for machines where nothing can be installed.
WHEELS ?=
WHEELS_PATH := $(if $(WHEELS),$(abspath $(WHEELS)))
# small, medium, large or sweep (small, on a GPU large); seconds of a simple suite; and which suites.
SCALE ?=
BUDGET ?=
SUITES ?=
# What make gpu runs: tests, sanitize, bench; and how many seconds each has: together less than ten minutes, and one
# alone, such as PARTS=bench, nine. A part whose time is up is interrupted, and reports what it has found. PARTS=tune
# tries other tiles for the large kernels.
PARTS ?= tests sanitize bench
ALONE := $(filter 1,$(words $(PARTS)))
TESTS_SECONDS ?= $(if $(ALONE),540,210)
SANITIZE_SECONDS ?= $(if $(ALONE),540,60)
BENCH_SECONDS ?= $(if $(ALONE),540,280)
TUNE_SECONDS ?= 540

BENCH_FILES = bench$(if $(SUITES),/test_$(subst $() $(), bench/test_,$(addsuffix .py,$(SUITES))))
BENCH = $(BENCH_FILES) $(if $(SCALE),--scale $(SCALE)) $(if $(BUDGET),--budget $(BUDGET)) $(ARGS)
BENCH_ENVIRONMENT = RESULTS=$(RESULTS_PATH) WHEELS=$(WHEELS_PATH)

.PHONY: demo test bench gpu checkout wheels lint clean

demo: $(VENV)/.installed-demo
	$(BIN)/evalp-fast demo --progress

test: $(VENV)/.installed-dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile --durations=10 $(ARGS)

bench: $(VENV)/.installed-dev
	$(BENCH_ENVIRONMENT) $(BIN)/python -m pytest $(BENCH)

# The peers as wheels, those that come as source too: pure Python, for any machine.
PEERS := normflows==1.7.3 nflows==0.14 zuko==1.6.0 FrEIA==0.2 torchebm==0.8.9 particles==0.4 torch-fidelity==0.4.0
wheels: $(VENV)/.installed-dev
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation \
	  --wheel-dir $(or $(WHEELS_PATH),build/wheels) $(PIP_ARGS) $(PEERS)

# In build/checkout all is links to this folder, laid out as installed: evalp_fast.kernels is found there.
CHECKOUT := build/checkout
checkout:
	@rm -rf $(CHECKOUT) && mkdir -p $(CHECKOUT)/evalp_fast
	@ln -s $(filter-out %/build %/evalp_fast %.egg-info,$(wildcard $(CURDIR)/*)) $(CHECKOUT)/
	@ln -s $(wildcard $(CURDIR)/evalp_fast/*) $(CURDIR)/kernels $(CHECKOUT)/evalp_fast/

PYTHON_PATH = $(if $(findstring /,$(PYTHON)),$(abspath $(PYTHON)),$(PYTHON))
# Interrupted, which lets pytest print its tables, and later killed.
WITHIN = timeout -s INT -k 20
PYTEST = $(PYTHON_PATH) -m pytest --continue-on-collection-errors
# Half a minute is for the imports and the tables.
BENCH_LIMIT = $(shell expr $(BENCH_SECONDS) - 30)
# Every part runs, whatever the ones before it found; the exit status is bad if one of theirs was. Each leaves a
# log. The measurements come last, and their table at their end.
gpu: checkout
	@$(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2> /dev/null || { \
	  echo "make gpu needs a CUDA or ROCm device, and a $(PYTHON) whose torch sees it" >&2; exit 2; }
	@mkdir -p $(RESULTS_PATH)
	@cd $(CHECKOUT) && status=0; \
	run() { log=$(RESULTS_PATH)/$$1.log; shift; { "$$@"; echo $$? > $(RESULTS_PATH)/.status; } 2>&1 | tee $$log; \
	  case $$(cat $(RESULTS_PATH)/.status) in 0) ;; \
	    124|137) echo "$${log##*/}: interrupted, its time was up" | tee -a $$log; status=1;; *) status=1;; esac; \
	  rm -f $(RESULTS_PATH)/.status; }; \
	case " $(PARTS) " in *" tests "*) \
	  run tests $(WITHIN) $(TESTS_SECONDS) $(PYTEST) -m gpu tests $(ARGS);; esac; \
	case " $(PARTS) " in *" sanitize "*) \
	  if command -v compute-sanitizer > /dev/null; then \
	    end=$$(( $$(date +%s) + $(SANITIZE_SECONDS) )); \
	    for tool in memcheck racecheck; do \
	      left=$$(( end - $$(date +%s) )); \
	      if [ $$left -lt 5 ]; then echo "$$tool did not run: no time was left (PARTS=sanitize has more)"; continue; fi; \
	      run $$tool env PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(WITHIN) $$left \
	        compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON_PATH) -m bench.sanitize; \
	    done; \
	  else echo "compute-sanitizer is not on the path: memcheck and racecheck did not run"; fi;; esac; \
	case " $(PARTS) " in *" tune "*) \
	  run tune $(WITHIN) $(TUNE_SECONDS) $(PYTHON_PATH) -m bench.tune;; esac; \
	case " $(PARTS) " in *" bench "*) \
	  run bench env $(BENCH_ENVIRONMENT) $(WITHIN) $(BENCH_SECONDS) $(PYTEST) --limit $(BENCH_LIMIT) $(BENCH);; esac; \
	exit $$status

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
