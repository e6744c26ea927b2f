# `make demo` and `make test` do all of their own set-up on a fresh machine.

PYTHON ?= python3
VENV ?= .venv
# Given to pip, e.g. an index that holds a CPU build of torch, where disk is short.
PIP_ARGS ?=
JOBS ?= 2
DEMO_DATA ?= data/shapes
# Options of `prepare-data shapes` and overrides of the configuration demo, for a smaller demo.
DEMO_SCENES ?=
DEMO_ARGS ?=
ABLATION_ARGS ?=
COMPARE_ARGS ?=
FUZZ_ARGS ?=

BIN := $(VENV)/bin
CONCAT := $(BIN)/concat

.DEFAULT_GOAL := help
.PHONY: help venv demo test wheel oldest fuzz kills lint docs ablation compare reference tiny-clip clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# What runs, and what develops: pip is asked again whenever what it is asked for changes.
$(VENV)/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[dev]'
	$(BIN)/python -m pip install --no-deps 'panopticapi-lite>=0.2'  # it asks for numpy < 2, in vain
	@touch $@ $(VENV)/.run

$(VENV)/.docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[docs]'
	@touch $@

venv: $(VENV)/.dev ## a virtual environment with everything

demo: $(VENV)/.run ## the whole chain on the built-in world: 25 minutes on two cores, under 12 with bf16
	$(CONCAT) prepare-data shapes $(DEMO_DATA) $(DEMO_SCENES)
	$(CONCAT) train-con -c demo data.root=$(DEMO_DATA) $(DEMO_ARGS)
	$(CONCAT) train-cat --name demo
	$(CONCAT) finetune --name demo
	$(CONCAT) evaluate --name demo
	$(CONCAT) predict --name demo --scale 4 --out predictions/demo \
		$$(ls $(DEMO_DATA)/val/*.png | sed -n 1,12p)

test: $(VENV)/.dev ## all tests, at most 10 minutes on two cores
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

wheel: $(VENV)/.dev ## builds the wheel and uses it where nothing of this checkout is
	.ci/wheel

oldest: ## the core of the tests with the oldest dependencies allowed, in an environment of its own
	.ci/oldest

fuzz: $(VENV)/.dev ## 10,000 spoilt files of every kind that is read; FUZZ_ARGS="--seed 1" for others
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(FUZZ_ARGS)

kills: $(VENV)/.dev ## 100 kills at random times and 20 before renames, over all stages: 10 minutes
	OMP_NUM_THREADS=1 $(BIN)/python tests/kills.py

lint: $(VENV)/.dev ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.docs ## the site of these documents in site/, every link checked, nothing fetched
	$(BIN)/python docs/make_site.py

ablation: $(VENV)/.run ## every cell of the ablation that is not there yet, then its tables
	$(BIN)/python benchmarks/ablation.py $(ABLATION_ARGS)

compare: $(VENV)/.run ## CONCAT, ZegFormer and CLIP-ZSS on the same scenes of three splits, then the tables
	$(BIN)/python benchmarks/compare.py $(COMPARE_ARGS)

reference: $(VENV)/.run ## the configuration shapes on the default split and on those of seeds 1 and 2
	for split in default=-1 1=1 2=2; do \
		name=shapes-$${split%=*} seed=$${split#*=}; \
		root=data/$$name run="--name $$name"; \
		$(CONCAT) prepare-data shapes $$root --unseen-seed=$$seed && \
		$(CONCAT) train-con -c shapes $$run data.root=$$root shapes.unseen_seed=$$seed && \
		$(CONCAT) train-cat $$run && $(CONCAT) finetune $$run && $(CONCAT) evaluate $$run || exit 1; \
	done

tiny-clip: $(VENV)/.run ## the built-in CLIP from scratch, about 10 minutes, then its scores
	$(BIN)/python -m benchmarks.tiny_clip.train

clean: ## removes the virtual environment and caches; data and runs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
