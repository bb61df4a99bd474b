# `make help` lists the targets. Everything is installed into .venv, and nothing outside it is touched.

PYTHON ?= python3
# Set to 1 to use the torch and triton already installed for PYTHON (a CUDA or ROCm build).
SYSTEM_TORCH ?=
# What to install otherwise. An exact version, so that an unpinned request cannot pull in several GB
# of GPU libraries by surprise; on a machine with a GPU use SYSTEM_TORCH=1 or TORCH='torch>=2.11'.
TORCH ?= torch==2.13.0
# Further arguments for pytest (make test ARGS='-k rope -x') or for the demo's server.
ARGS ?=

# Where Python may not keep bytecode, every process of a test run compiles the project and its tests anew.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
PY := $(VENV)/bin/python
# One process a core, one thread each (tests/conftest.py): small matrices gain nothing from more.
PYTEST := $(PY) -m pytest -n auto --dist worksteal
READY := $(VENV)/.ready
comma := ,
# Parts of pyproject.toml to install; what was installed once stays.
EXTRAS := dev,peers$(if $(filter test-all,$(MAKECMDGOALS)),$(comma)evals$(comma)train)

# The choices named by the user this time; the others stay as they were when .venv was made.
NAMED := $(foreach v,PYTHON SYSTEM_TORCH TORCH,$(if $(filter command environment,$(firstword $(origin $v))),$v))

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check bench clean force

help:
	@echo "make demo       a tour in a minute: the built-in model behind the real server (CPU, nothing to download)"
	@echo "make check      lint, formatting, types, house rules and the fast tests: before every commit"
	@echo "make test       the tests, parity with transformers included (under 10 minutes on 2 cores)"
	@echo "make test-all   every test that needs no GPU; installs lm_eval and matplotlib too (about 550 MB)"
	@echo "make bench      measure generation on a tiny synthetic checkpoint; prints JSON lines"
	@echo "make clean      remove what these targets made, .venv included"
	@echo
	@echo "The first target that runs sets up .venv. Variables:"
	@echo "  PYTHON=python3.12       the interpreter to build .venv from (3.11 or newer; now: $(PYTHON))"
	@echo "  SYSTEM_TORCH=1          keep the torch and triton installed for PYTHON; never replaces them"
	@echo "  TORCH='torch>=2.11'     the torch to install when SYSTEM_TORCH is not set (now: $(TORCH))"
	@echo "  ARGS='-k name -x'       more arguments for pytest, or for the demo's server (ARGS='--device cpu')"

$(READY): pyproject.toml tools/setup_venv.py
	@$(PYTHON) tools/setup_venv.py --venv $(VENV) --ready $(READY) --extras $(EXTRAS) \
	    --torch '$(TORCH)' --system-torch '$(SYSTEM_TORCH)' --named '$(NAMED)'

# A choice named on the command line, or more to install, is always compared with what .venv has.
ifneq ($(strip $(NAMED) $(filter test-all,$(MAKECMDGOALS))),)
$(READY): force
endif
force:

demo: $(READY)
	@$(PY) examples/tour.py $(ARGS)

test: $(READY)
	$(PYTEST) -m "not gpu and not slow" $(ARGS)

test-all: $(READY)
	$(PYTEST) -m "not gpu" $(ARGS)

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PYTEST) -q -m "not gpu and not slow and not full" $(ARGS)

bench: $(READY)
	@echo "== bench/forward.py: generation on a tiny synthetic checkpoint, CPU" >&2
	@$(PY) bench/forward.py
	@echo "== bench/scheduler.py: what the host does for one decode step, the model stubbed" >&2
	@$(PY) bench/scheduler.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fourfold tests bench tools train examples -name __pycache__ -type d -prune -exec rm -rf {} +
