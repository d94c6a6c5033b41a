PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= demo,dev
ARGS   ?=
STAMP  := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
BIN    := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: help install train test soak arm bench lint types clean

help:
	@echo "make train   train a block-sparse network beside its dense twin (ARGS='--help' for the options)"
	@echo "make test    run the tests"
	@echo "make soak    kill 200 training runs and resume them; feed every reader damaged files and"
	@echo "             the kernels random inputs, under sanitizers (an hour)"
	@echo "make arm     run the CPU kernels' tests on emulated ARM (Debian; an hour; ARGS='tests/... -k ...')"
	@echo "make bench   race the CPU kernels against other libraries (eight minutes; ARGS=--quick: one)"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove the environment and what was built"

install: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or newer is needed; try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot create environments with pip (module ensurepip or venv missing)." >&2; \
	    echo "       On Debian or Ubuntu: apt-get install python3-venv; or name another one: make PYTHON=/path/to/python3" >&2; \
	    exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The interpreter is an order-only prerequisite: its time stamp would cause reinstalls.
$(STAMP): setup.py pyproject.toml constraints.txt $(wildcard kernels/cpu/csrc/*) | $(BIN)/python
	@echo "installing sparsekern and what it needs into $(VENV) (some minutes, once) ..."
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

train: $(STAMP)
	$(BIN)/sparsekern train $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

# One thread: the runs are tiny, and forked from a process that must not have started others.
soak: export OMP_NUM_THREADS = 1
soak: $(STAMP)
	$(BIN)/python -m tests.soak.kills --kills 200
	$(BIN)/python -m tests.soak.hosts
	$(BIN)/python -m tests.soak.readers --inputs 3000
	$(BIN)/python tests/sanitize_cpu.py 5000

arm: $(STAMP)
	$(BIN)/python -m tests.soak.arm $(ARGS)

bench: $(BENCH_STAMP)
	$(BIN)/python -m bench.race $(ARGS)

$(BENCH_STAMP): $(STAMP)
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	@touch $@

lint: $(STAMP) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# For type checkers only: lets them find kernels/ under its installed name. Ignored by git, never packaged.
typings/sparsekern/kernels:
	@mkdir -p $(@D)
	@ln -sfn ../../kernels $@

types: $(STAMP) | typings/sparsekern/kernels
	$(BIN)/mypy -p sparsekern -p sparsekern.kernels

clean:
	rm -rf $(VENV) kernels/cpu/*.so build dist typings *.egg-info .mypy_cache .pytest_cache .ruff_cache
