# Two commands do everything on a machine with Python 3.11: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= runs/demo

.PHONY: help setup browser model demo test lint bench clean

help:
	@echo "make demo   set up, train L2M2 and its controls on a warehouse, print one table, write replays"
	@echo "make test   set up, run the linter, the type checker and all tests"
	@echo "make lint   the linter and the type checker alone"
	@echo "make bench  measure environment, training and scoring speed"
	@echo "make clean  remove caches (not runs, not the virtual environment)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Echelon needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $(READY)

# The tests of pages need a real browser. Without the right to install one they are skipped, and say so.
browser:
	@command -v chromedriver >/dev/null && command -v chromium >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    { echo "installing chromium for the tests of pages"; apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; }; } || \
	  echo "no chromium here and no right to install it: the tests of pages will be skipped"

model: setup
	@$(BIN)/echelon models fetch smollm2-135m --gguf

demo: setup model
	$(BIN)/echelon compare --methods l2m2 flat-mappo llm-only random-goals rule-goals \
	  --env warehouse --env.size 20 --env.num-agents 4 --env.num-packages 8 --steps 1000000 --out $(OUT)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two at a time, each with whole files: what a file's tests share is built once.
test: lint browser model
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: setup model
	$(BIN)/python benchmarks/bench_envs.py
	$(BIN)/python benchmarks/bench_training.py
	$(BIN)/python benchmarks/bench_scoring.py

clean:
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
