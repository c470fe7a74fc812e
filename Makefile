# The commands that a fresh machine needs. Each sets up .venv first; a second run starts at once.
# test-openmmlab has an environment of its own, with the original OpenMMLab packages.
PYTHON ?= python3
TASK ?= detection
BIN := .venv/bin
READY := .venv/.ready
READY_OPENMMLAB := .venv-openmmlab/.ready
READY_DOCS := .venv/.ready-docs
# Nothing from the environment that make is called in may leak into ours. Without bytecode, which
# some container images switch off, every program would start twice as slowly.
RUN := env -u PYTHONPATH -u PYTHONHOME -u PYTHONDONTWRITEBYTECODE PYTHONNOUSERSITE=1
PYTEST := python -m pytest --numprocesses auto --dist worksteal

.PHONY: help setup demo docs test test-slow test-openmmlab lint clean

help:
	@echo 'make demo       make a small real data set, train, evaluate, draw predictions (CPU);'
	@echo '                TASK=detection (default), instance, semantic or classification;'
	@echo '                PRETRAINED=1 starts the detector from that classifier'
	@echo 'make test       lint and run the tests, one process a core'
	@echo 'make test-slow  run the tests that take long'
	@echo 'make test-openmmlab'
	@echo '                run the tests of make test with the original OpenMMLab packages'
	@echo 'make docs       build the documentation as a site, docs/_build/html/index.html'
	@echo 'make setup      only create .venv with everything installed'
	@echo 'make clean      remove .venv, .venv-openmmlab and what the demo made'

$(READY): FAMILY := onedl
$(READY_OPENMMLAB): FAMILY := openmmlab
$(READY) $(READY_OPENMMLAB): $(wildcard constraints*.txt) setup.py tools/dev/install.py tools/dev/cxx.py $(wildcard acmix_mm/ops/csrc/*)
	@$(RUN) $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python >= 3.10 is needed; choose one with make PYTHON=...")'
	$(RUN) $(PYTHON) -m venv $(@D)
	$(RUN) $(@D)/bin/python tools/dev/install.py --family $(FAMILY)
	@touch $@

# What builds the documentation and executes its notebook, beside the rest.
$(READY_DOCS): $(READY) docs/requirements.txt
	$(RUN) $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-onedl.txt --requirement docs/requirements.txt
	@touch $@

setup: $(READY)

docs: $(READY_DOCS)
	$(RUN) $(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --builder html docs docs/_build/html
	@echo 'documentation: docs/_build/html/index.html'

demo: $(READY)
	$(RUN) $(BIN)/python tools/demo.py --task $(TASK) $(if $(PRETRAINED),--pretrained)

lint: $(READY)
	$(RUN) $(BIN)/ruff check .
	$(RUN) $(BIN)/ruff format --check .

test: lint
	$(RUN) $(BIN)/$(PYTEST) -m 'not slow'

test-slow: $(READY_DOCS)
	$(RUN) $(BIN)/$(PYTEST) -m slow

test-openmmlab: $(READY_OPENMMLAB)
	$(RUN) $(<D)/bin/$(PYTEST) -m 'not slow'

clean:
	rm -rf .venv .venv-openmmlab build docs/_build *.egg-info data/scene_digits work_dirs/demo checkpoints/acmix-r26_single-digits.pth
