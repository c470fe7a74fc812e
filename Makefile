# The commands that a fresh machine needs. Each sets up .venv first; a second run starts at once.
PYTHON ?= python3
TASK ?= detection
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Nothing from the environment that make is called in may leak into .venv. Without bytecode, which
# some container images switch off, every program would start twice as slowly.
RUN := env -u PYTHONPATH -u PYTHONHOME -u PYTHONDONTWRITEBYTECODE PYTHONNOUSERSITE=1

.PHONY: help setup demo test test-slow lint clean

help:
	@echo 'make demo       make a small real data set, train, evaluate, draw predictions (CPU);'
	@echo '                TASK=detection (default), instance, semantic or classification;'
	@echo '                PRETRAINED=1 starts the detector from that classifier'
	@echo 'make test       lint and run the tests, one process a core'
	@echo 'make test-slow  run the tests that take long'
	@echo 'make setup      only create .venv with everything installed'
	@echo 'make clean      remove .venv and what the demo made'

$(READY): constraints.txt setup.py tools/dev/install.py tools/dev/cxx.py $(wildcard acmix_mm/ops/csrc/*)
	@$(RUN) $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python >= 3.10 is needed; choose one with make PYTHON=...")'
	$(RUN) $(PYTHON) -m venv $(VENV)
	$(RUN) $(BIN)/python tools/dev/install.py
	@touch $@

setup: $(READY)

demo: $(READY)
	$(RUN) $(BIN)/python tools/demo.py --task $(TASK) $(if $(PRETRAINED),--pretrained)

lint: $(READY)
	$(RUN) $(BIN)/ruff check .
	$(RUN) $(BIN)/ruff format --check .

test: lint
	$(RUN) $(BIN)/python -m pytest -m 'not slow' --numprocesses auto --dist worksteal

test-slow: $(READY)
	$(RUN) $(BIN)/python -m pytest -m slow --numprocesses auto --dist worksteal

clean:
	rm -rf $(VENV) build *.egg-info data/scene_digits work_dirs/demo checkpoints/acmix-r26_single-digits.pth
