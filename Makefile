# Everything a contributor types. The first run makes .venv and installs; later runs only run.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: install demo test chaos model-check bench check docs format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/install.sh
	@touch $(STAMP)

demo: $(STAMP)          ## three servers on this machine answer a question
	@$(BIN)/petals demo $(ARGS)

# Tests inside one process share the cores; those that start processes have the machine to themselves.
IN_WORKERS := $(BIN)/python -m pytest -q -n 2 --dist loadfile

SITE := $(BIN)/sphinx-build --builder html --fresh-env --fail-on-warning --quiet docs build/docs
PYTHON_CODE := src tests tools examples benchmarks docs/_ext docs/conf.py

test: $(STAMP)          ## every test, real processes and the site included; ARGS= chooses some
ifeq ($(strip $(ARGS)),)
	$(IN_WORKERS) -m "not e2e"
	$(BIN)/python -m pytest -q -m e2e
	$(SITE)
else
	$(BIN)/python -m pytest -q $(ARGS)
endif

# The chaos tests and some benchmarks use each other's parts and the network laboratory.
WITH_TOOLS := PYTHONPATH=tests:tools OMP_NUM_THREADS=1 $(BIN)/python

SEED    ?= 1
MINUTES ?= 5
chaos: $(STAMP)         ## faults by a seeded schedule; SEED=, MINUTES= or RUNS=, ONLY=, MODELS=, NETWORK=1, LAPTOP=1
	$(WITH_TOOLS) -m chaos --seed $(SEED) --minutes $(MINUTES) \
		$(if $(RUNS),--runs $(RUNS)) $(if $(ONLY),--only $(ONLY)) $(if $(MODELS),--models $(MODELS)) \
		$(if $(NETWORK),--network) $(if $(LAPTOP),--laptop) $(if $(WRITE),--write benchmarks/results) $(ARGS)

FIRST     ?= 0
SCHEDULES ?= 5000
model-check: $(STAMP)   ## the session core under drawn schedules; FIRST=, SCHEDULES=
	$(WITH_TOOLS) -m model --first $(FIRST) --schedules $(SCHEDULES)

bench: $(STAMP)         ## one benchmark: RUN="ring.py --out FILE"
	$(WITH_TOOLS) benchmarks/$(RUN)

check: $(STAMP)         ## style, types, layers and the unit tests: under two minutes
	$(BIN)/ruff check $(PYTHON_CODE)
	$(BIN)/ruff format --check $(PYTHON_CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(IN_WORKERS) -m "not slow" tests/unit tests/compat tests/test_house.py

docs: $(STAMP)          ## the documentation site, warnings as errors, in build/docs
	$(SITE)

format: $(STAMP)        ## let ruff rewrite
	$(BIN)/ruff check --fix $(PYTHON_CODE)
	$(BIN)/ruff format $(PYTHON_CODE)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
