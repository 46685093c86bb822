# `make` lists the targets. The setup runs once, in $(VENV); `make setup PYTHON=python3.12` selects
# the Python, and VENV=/path an environment of your own. See CONTRIBUTING.md.

PYTHON ?= python3
VENV := .venv
PYTEST_ARGS :=

BACKBONE := output/demo_pretrain/model_final.pth
# Resumes an interrupted run.
PRETRAIN = $(RUN) tools/lazyconfig_train_net.py --resume --config-file configs/demo/pretrain.py

RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
# Exists from the creation of the environment until its setup has ended, also in a reported error. If
# it is found, the setup was killed and may have left half a package behind.
UNFINISHED := $(VENV)/.unfinished
CHECK_PYTHON := -c 'import sys; sys.version_info >= (3, 10) or sys.exit("setup: Python 3.10 or newer is required, and " + sys.executable + " is " + sys.version.split()[0] + ": select another: make setup PYTHON=python3.12")'

.PHONY: help setup demo compare benchmark benchmark-gpu docs test lint format clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s%s\n", $$1, $$2}' Makefile

setup: $(READY)  ## set up the virtual environment, once
	@echo "setup: $(VENV) is ready"

$(READY): setup.py $(wildcard requirements/*.txt) tools/setup_environment.py crossmae_det/tools/install_detectron2.py
	@if [ -e $(UNFINISHED) ]; then \
	    echo "setup: an earlier setup of $(VENV) was killed: starting over"; \
	    rm -rf $(VENV); \
	fi
	@if [ -x $(RUN) ]; then \
	    $(RUN) $(CHECK_PYTHON); \
	elif [ -e $(VENV) ]; then \
	    echo "setup: $(VENV) exists but has no working bin/python: remove it, or select another with VENV=" >&2; \
	    exit 2; \
	else \
	    $(PYTHON) $(CHECK_PYTHON) && \
	    echo "setup: creating $(VENV) with $$($(PYTHON) --version)" && \
	    mkdir -p $(VENV) && touch $(UNFINISHED) && $(PYTHON) -m venv $(VENV); \
	fi
	@$(RUN) tools/setup_environment.py
	@touch $@

demo: $(READY)  ## pretrain on the built-in dataset, then train and evaluate Mask R-CNN, into output/
	$(RUN) -m crossmae_det demo

compare: $(BACKBONE)  ## AP from the pretrained backbone of the demo and from a random one, three seeds
	$(RUN) tools/compare_backbones.py --config-file configs/demo/mask_rcnn.py --seeds 3 \
	    --backbones pretrained=$(BACKBONE) random= --output output/compare

benchmark: $(READY)  ## compare the backbone with detectron2's in five minutes, into output/benchmark
	$(RUN) tools/benchmark.py --backbones detectron2-vit-base vit-base --image-sizes 512 1024 --repeats 3 \
	    --json output/benchmark/backbones.json --csv output/benchmark/backbones.csv \
	    --markdown output/benchmark/backbones.md --plots output/benchmark

benchmark-gpu: $(READY)  ## measure everything on a GPU in ten minutes, into output/benchmark_gpu
	$(RUN) -m crossmae_det benchmark-gpu --output output/benchmark_gpu

$(BACKBONE): | $(READY)
	$(PRETRAIN)

docs: $(READY)  ## build the documentation site, into site/
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

test: lint docs  ## all checks: the linter, the type checker, the documentation and the tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --durations=15 $(PYTEST_ARGS)

lint: $(READY)  ## check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy crossmae_det

format: $(READY)  ## rewrite the sources in the project's style
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## remove caches and build products; .venv, output and datasets stay
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find configs crossmae_det tests tools -name __pycache__ -prune -exec rm -rf {} +
