# make demo   train a small Mixtral, make its plan, quantize, reload, compare (minutes on two CPU cores)
# make test   the whole test suite, on two cores; `make test WORKERS=8` takes more
# make test-fast   the tests that take no time: about a minute, most of it imports
# make lint   ruff and mypy
# make notebook   executes docs/first-hour.ipynb again, minutes
# make docs   the documentation's site, in site/, with warnings as errors
# Each works on a fresh checkout: it first makes .venv and installs the exact versions in constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast lint docs notebook test-exports test-serving benchmarks evidence
demo: .venv/installed
	$(BIN)/moe-precision demo --output runs/demo

test: .venv/peers
	$(PYTEST)

test-fast: .venv/peers
	$(PYTEST) -m "not slow and not thorough"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# API pages come from the source alone; nothing of the package is imported.
docs: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e .[docs]
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebook: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e .[docs]
	mkdir -p runs/notebook && cp docs/first-hour.ipynb runs/notebook/
	cd runs/notebook && PATH="$(CURDIR)/$(BIN):$$PATH" python -m jupyter nbconvert --to notebook --execute --inplace first-hour.ipynb
	cp runs/notebook/first-hour.ipynb docs/ && $(BIN)/python docs/clean_notebook.py docs/first-hour.ipynb

# Carries exported plans out with the real tools, each in its own virtual environment. Half an hour, most of it installs.
test-exports:
	PYTHON=$(PYTHON) tests/export/real_tools/run.sh

# Serves packed checkpoints of every family with the real vLLM, on a CPU. An hour, half of it installs and imports.
test-serving: .venv/installed
	PYTHON=$(PYTHON) tests/serving/real_engine/run.sh

# Needs the model of `make demo`.
benchmarks: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e .[benchmarks]
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.sizes
	$(BIN)/python -m benchmarks.recording
	$(BIN)/python -m benchmarks.quantizing --run runs/demo
	$(BIN)/python -m benchmarks.rounding
	$(BIN)/python -m benchmarks.peers ours --run runs/demo
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.checkpoint_plan
	$(BIN)/python -m benchmarks.allocating
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.annealing
	$(BIN)/python -m benchmarks.inference
	$(BIN)/python -m benchmarks.layers
	$(BIN)/python -m benchmarks.llama_cpp
	$(BIN)/python -m benchmarks.products
	$(BIN)/python -m benchmarks.activations --run runs/demo
	$(BIN)/python -m pytest -m thorough

# Prints the tables in docs/*-tables.md. Takes hours.
evidence: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e .[benchmarks]
	$(BIN)/python -m benchmarks.studies.study --output runs/study --workers 2
	$(BIN)/python -m benchmarks.studies.study --output runs/study --report > docs/evidence-tables.md
	$(BIN)/python -m benchmarks.studies.rounding_study --output runs/study --workers 2
	$(BIN)/python -m benchmarks.studies.rounding_study --output runs/study --report > docs/rounding-tables.md
	$(BIN)/python -m benchmarks.studies.cost_scales --output runs/study --seeds 0
	$(BIN)/python -m benchmarks.studies.cost_scales --output runs/study --report > docs/cost-scales-tables.md
	$(BIN)/python -m benchmarks.studies.dropping_study --output runs/study --workers 2
	$(BIN)/python -m benchmarks.studies.dropping_study --output runs/study --report > docs/dropping-tables.md
	$(BIN)/python -m benchmarks.studies.anneal_study --output runs/anneal --workers 2
	$(BIN)/python -m benchmarks.studies.anneal_study --output runs/anneal --report > docs/annealing-tables.md
	$(BIN)/python -m benchmarks.studies.anneal_start --output runs/anneal --seeds 0
	$(BIN)/python -m benchmarks.studies.anneal_start --output runs/anneal --report > docs/annealing-start-tables.md
	$(BIN)/python -m benchmarks.studies.constant_rate --output runs/constant_rate --seeds 0
	$(BIN)/python -m benchmarks.studies.constant_rate --output runs/constant_rate --report > docs/constant-rate-tables.md
	$(BIN)/python -m benchmarks.studies.theory --output runs/theory

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e .[dev]
	touch $@

# Apart from the rest, because importing transformers imports torchao, which prints warnings on a CPU.
.venv/peers: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e .[dev,peers,workspace]
	touch $@
