# make demo   train a network on real images, measure it, cut it, check it
# make quick  lint, types, and the tests that take no time, in about a minute
# make test   everything that continuous integration runs
# make long   more cases of the same, and random networks, in about half an hour
# make bench  all benchmarks, in about half an hour
#
# They set up .venv by themselves. DATA=fashion-mnist picks the demo's data;
# CONSTRAINTS=FILE tests against other versions than the pinned ones.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
DATA ?= digits
BIN := $(VENV)/bin
READY := $(VENV)/.ready-for-dev
READY_FOR_DEMO := $(VENV)/.ready-for-demo

.PHONY: demo quick test long bench lint types site figures clean

demo: $(READY_FOR_DEMO)
	$(BIN)/taildropout demo --data $(DATA)

quick: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest tests -m "not slow and not long and not browser" \
		--numprocesses auto --dist loadfile

test: lint types site
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not long" --numprocesses auto --dist worksteal

long: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests -m long --numprocesses auto --dist worksteal
	$(BIN)/python -m benchmarks.attack_pruning --count 1000

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(READY)
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/tail_mlp.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/order.py
	$(BIN)/python benchmarks/scree.py
	$(BIN)/python benchmarks/widths.py
	$(BIN)/python benchmarks/elastic.py
	$(BIN)/python benchmarks/serving.py

figures: $(READY)
	$(BIN)/python -m docs.figures

# What the tests need of other packages takes minutes to install, and the demo does without.
$(READY) $(READY_FOR_DEMO): $(VENV)/.ready-for-%: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) site taildropout-demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
