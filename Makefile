# Every target works from a fresh clone: what needs .venv makes it first.
PYTHON ?= python3
BIN := .venv/bin
CORE := grpo models pipelines rewards rollout

.PHONY: setup quickstart r1-mini test docs check lint type layers loc clean

setup: .venv/.stamp ## .venv from the pinned set, again whenever the set changes

.venv/.stamp: requirements/cpu.lock requirements/install.sh pyproject.toml
	@PYTHON=$(PYTHON) requirements/install.sh
	@touch $@

quickstart: setup ## the tour: train a tiny model until it solves its task
	$(BIN)/grpo quickstart

r1-mini: setup ## the claims of the R1 paper in miniature, three seeds, two processes
	$(BIN)/grpo r1-mini

test: setup ## CPU, offline; two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: setup ## the site, into site/; fails at a link or an anchor that leads nowhere
	$(BIN)/zensical build --clean --strict

check: lint type layers

lint: setup
	$(BIN)/ruff check .

type: setup
	$(BIN)/basedpyright --pythonpath $(BIN)/python

layers: setup ## import directions, see pyproject.toml
	$(BIN)/lint-imports --no-logo

loc: ## lines per package
	@for package in $(CORE) examples tests; do \
	    printf '%-10s %6d\n' $$package $$(find $$package -name '*.py' -exec cat {} + | wc -l); \
	done
	@printf '%-10s %6d\n' core $$(find $(CORE) -name '*.py' -exec cat {} + | wc -l)

clean: ## caches and build output; .venv and runs/ stay
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
