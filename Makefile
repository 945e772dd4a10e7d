# Two commands on a fresh machine with Python >= 3.11, make and g++: `make demo`, `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One file to a worker: a file's tests share the programs that they compile.
PYTEST_ARGS ?= -n 2 --dist loadfile
PYTEST = $(BIN)/python -m pytest --benchmark-disable
DEMO_ARGS ?=
BENCH_ARGS ?=
MODELS_ARGS ?=
BROWSER_ARGS ?=
SERVE_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo browser serve test test-slow covering models bench bench-quick check format clean

help:
	@echo "make demo    meta-train and adapt on real handwriting, about 2 minutes (DEMO_ARGS='--minutes 1' for less)"
	@echo "make browser meta-train for a page that adapts in the browser, and serve it, 6 minutes (BROWSER_ARGS='--minutes 1' for less)"
	@echo "make serve   serve the demo's classifier over HTTP, and print requests to try; the first time 4 minutes (SERVE_ARGS='--port 8001')"
	@echo "make test    run the tests that take seconds each (PYTEST_ARGS='-k name' for some); test-slow: the others"
	@echo "make covering a few numbers of every kind under python -OO and -W error, half a minute"
	@echo "make models  adapt small models of well-known packages, which it installs (2 GB), and compare (MODELS_ARGS='--only peft' for some)"
	@echo "make bench   adaptrt and its peers on all workloads (BENCH_ARGS='-k sine' for some); bench-quick: 3 minutes"
	@echo "make check   formatting, lint, types, import layers"
	@echo "make format  apply formatting and the lint fixes that are safe"
	@echo "make clean   remove $(VENV) and caches"

demo: $(VENV)/.demo
	$(BIN)/adaptrt demo $(DEMO_ARGS)

# What was trained before is served at once, here and by `browser`.
serve: $(VENV)/.demo $(VENV)/.serve
	$(BIN)/python -m adaptrt.demo.serve $(SERVE_ARGS)

browser: $(VENV)/.browser export/browser/node_modules/.package-lock.json
	$(BIN)/python -m export.browser $(BROWSER_ARGS)

# npm writes this file last.
export/browser/node_modules/.package-lock.json: export/browser/package-lock.json
	@command -v npm >/dev/null 2>&1 || { \
	  echo "adaptrt: 'npm' was not found; Node.js 20 or newer brings it. On Debian and Ubuntu: apt-get install nodejs npm" >&2; exit 1; }
	npm ci --prefix export/browser --ignore-scripts --no-audit --no-fund
	@touch $@

test: $(VENV)/.test
	$(PYTEST) $(PYTEST_ARGS) -m 'not slow'

# Compilations of large programs, and processes that are forked, signalled and killed.
test-slow: $(VENV)/.test
	$(PYTEST) $(PYTEST_ARGS) -m slow

# Tests say nothing under `python -O`, which removes their assertions; this script raises.
covering: $(VENV)/.test
	$(BIN)/python -OO -m tests.covering
	$(BIN)/python -W error -m tests.covering --compiled

# Not part of the tests: the packages are large, and their next releases are not ours.
# Where torch is a build that these two were not made for, transformers and others cannot even be imported beside them.
models: $(VENV)/.models
	@for package in torchvision torchaudio; do $(BIN)/python -c "import $$package" 2>/dev/null || { $(PIP) uninstall --quiet --yes $$package; \
	  echo "adaptrt: $$package was removed, as the one that pip found does not fit this torch; models that need it are left out"; }; done
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/model_zoo.py --check $(MODELS_ARGS)

# The report's tables go to the screen, JSON, tables and plot to build/.
BENCH = $(BIN)/python -m pytest -o python_files='bench_*.py' -o filterwarnings=default -q --show-capture=no benchmarks/suite --benchmark-json=build/$@.json
REPORT = $(BIN)/python -m benchmarks.suite.report build/$@.json --command 'make $@'

bench: $(VENV)/.bench $(VENV)/.demo
	@mkdir -p build
	$(BENCH) $(BENCH_ARGS)
	$(REPORT)

bench-quick: $(VENV)/.bench $(VENV)/.demo
	@mkdir -p build
	$(BENCH) -k 'test_latency and (sine or adapters)' --share 0.3 $(BENCH_ARGS)
	$(REPORT)

check: $(VENV)/.test $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache build dist export/browser/node_modules

# A half-made environment is removed, so that the next try starts afresh.
$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "adaptrt: '$(PYTHON)' was not found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "adaptrt: '$(PYTHON)' is $$($(PYTHON) --version 2>&1); 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "adaptrt: '$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# One stamp an extra, younger than what it was made from: nothing is installed twice, and a changed pin reinstalls.
$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "adaptrt: installing the '$*' environment into $(VENV)"
	@$(PIP) install --quiet -c constraints.txt -e '.[$*]' || { \
	  echo "adaptrt: pip could not install '.[$*]' ; its message is above. If a download failed, check the network and run make again." >&2; \
	  exit 1; }
	@touch $@
