# Two commands do everything: `make lessons` runs the course, `make test` checks it. Each first makes the
# environment it needs, in .venv. `make help` lists the rest.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
WORKERS ?= 2
SEEDS ?= 5
SUBMISSIONS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv lessons test lint lab notebooks sync links check record bench students mark clean

help: ## show this list
	@echo "minivlp: make TARGET"
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Options: LESSON=01_vit (lessons, notebooks, record), SEEDS=5 (record), SUBMISSIONS=\"a.ipynb ...\" (mark),"
	@echo "PYTEST_ARGS=\"...\", WORKERS=2 (test), PYTHON=python3, TORCH=torch==2.13.0 (first set-up)."

venv: $(STAMP) ## set up .venv alone (the other targets do it by themselves)

# torch stands in both commands, so that no later requirement can exchange the version that was asked for.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "minivlp needs Python 3.10 or newer, but \`$(PYTHON)\` is not. Name a newer one: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Setting up $(VENV) with $(TORCH): a few minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet "$(TORCH)" -e ".[notebooks,tests,teachers]"
	@touch $(STAMP)

lessons: $(STAMP) ## run every lesson top to bottom; executed copies land in build/
	@$(BIN)/python -m minivlp.notebooks run $(LESSON)

# Workers side by side share the cores, so each gives torch its share of them.
test: $(STAMP) ## all tests: style, package, and every notebook executed by nbval
	@status=0; \
	export OMP_NUM_THREADS=$$($(BIN)/python -c 'import os; print(max(1, os.cpu_count() // $(WORKERS)))'); \
	$(BIN)/python -m ruff check . || status=1; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  --nbval-lax --nbval-current-env --nbval-cell-timeout 900 $(PYTEST_ARGS) notebooks tests || status=1; \
	exit $$status

lint: $(STAMP) ## style alone
	@$(BIN)/python -m ruff check .

lab: $(STAMP) ## open JupyterLab on the notebooks
	@$(BIN)/python -m jupyterlab notebooks

notebooks: $(STAMP) ## execute the notebooks in place (the same code gives the same bytes)
	@$(BIN)/python -m minivlp.notebooks execute $(LESSON)

sync: $(STAMP) ## copy changed definitions from the package into the lessons that show them
	@$(BIN)/python -m minivlp.notebooks sync

links: $(STAMP) ## rewrite badges and setup cells from the address in pyproject.toml
	@$(BIN)/python -m minivlp.notebooks links

check: $(STAMP) ## look for problems in the notebooks without running them
	@$(BIN)/python -m minivlp.notebooks check

record: $(STAMP) ## train the reference runs of a lesson again: make record LESSON=01_vit SEEDS=5
	@$(BIN)/python -m minivlp.record $(or $(LESSON),01_vit) --seeds $(SEEDS)

bench: $(STAMP) ## our training step beside other people's
	@$(BIN)/python -m minivlp.bench

students: $(STAMP) ## editions without solutions, in build/students/
	@$(BIN)/python -m minivlp.notebooks students

mark: $(STAMP) ## mark handed-in notebooks: make mark SUBMISSIONS="ann/01_vit.ipynb ..."
	@$(BIN)/python -m minivlp.notebooks mark $(SUBMISSIONS)

clean: ## remove build/ and caches (.venv stays)
	@rm -rf build .pytest_cache .ruff_cache *.egg-info
	@find minivlp tests notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
