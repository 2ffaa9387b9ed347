# make demo   train a network on real images, measure it, cut it, check it
# make test   everything that continuous integration runs
#
# Both set up .venv by themselves. DATA=fashion-mnist picks the demo's data;
# CONSTRAINTS=FILE tests against other versions than the pinned ones.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
DATA ?= digits
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types figures clean

demo: $(READY)
	$(BIN)/taildropout demo --data $(DATA)

test: lint types
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

figures: $(READY)
	$(BIN)/python docs/figures.py

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) taildropout-demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
