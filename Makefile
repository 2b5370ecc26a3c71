# make demo    train, retrofit and compare a toy model on two cores, in minutes
# make test    lint, types and tests
# make faults  the long tests: 200 kills, and every engine going on from every other; about ten minutes
# make fuzz    110,000 inputs changed at random for all that reads files; minutes
# make compat  exported folders in four versions of transformers, which are downloaded; three minutes
# make setup   only the environment (implied by the others; does nothing, and needs no network, once it is up to date)
# make lint    ruff and mypy
# make clean   remove the environment, builds and caches; runs stay

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# The virtual environment's commands come first, for recipes that call `retrofit`, `accelerate` or `python`.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test faults fuzz compat lint clean

help:
	@sed -n 's/^# make /make /p' Makefile

setup: $(STAMP)

# constraints.txt pins torch: without a pin pip may bring gigabytes of CUDA. On a Linux machine whose package index has
# only CUDA builds of torch, set PIP_EXTRA_INDEX_URL to PyTorch's CPU index first.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a minute or two"
	$(VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	bash recipes/demo/demo.sh

test: lint
	python -m pytest

faults: setup
	RETROFIT_KILLS=200 RETROFIT_MATRIX=1 python -m pytest -rP tests/training/test_faults.py tests/training/test_engines.py \
	    tests/training/test_resume.py tests/checkpoints

fuzz: setup
	RETROFIT_FUZZ=10000 python -m pytest tests/test_fuzz.py

compat: setup
	python -m tests.hub.compat

lint: setup
	ruff check .
	mypy

clean:
	rm -rf $(VENV) .compat build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find retrofit tests -name __pycache__ -type d -prune -exec rm -rf {} +
