# make quickstart   set up, train the embedded demo with two processes, export it, score it
# make test         set up and run the test suite;  make test PYTHON=python3.12 for the other set of versions
# make lint         set up and check style
# make env          set up only: .venv-py311 or .venv-py312 with the versions in tested-versions/
# make clean        remove the environments

SUPPORTED := 3.11 3.12
ABOUT_PYTHON := 'import sys; print("%d.%d" % sys.version_info[:2])'
# the first interpreter of a supported version, unless PYTHON is given
PYTHON ?= $(firstword $(foreach name,python3 python3.11 python3.12,\
	$(if $(filter $(SUPPORTED),$(shell $(name) -c $(ABOUT_PYTHON) 2>/dev/null)),$(name))) python3)
# pyenv's stand-in for a version that is not switched on does not run: then the version itself
INTERPRETER := $(shell $(PYTHON) -c '' 2>/dev/null && echo $(PYTHON) || \
	for version in $$(pyenv whence $(PYTHON) 2>/dev/null); do \
		echo "$$(pyenv root)/versions/$$version/bin/$(PYTHON)"; done | tail -1)
VERSION := $(if $(INTERPRETER),$(shell $(INTERPRETER) -c $(ABOUT_PYTHON) 2>/dev/null))
TAG := py$(subst .,,$(VERSION))
VENV := .venv-$(TAG)
PINS := $(wildcard tested-versions/*$(TAG).txt)
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install -qq
PYTEST_ARGS ?=

# a run's own settings must not reach the tests, nor another installation's packages this one
unexport PYTHONPATH PYTHONHOME RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
unexport NPROC_PER_NODE NNODES NODE_RANK
export PYTHONNOUSERSITE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test lint env clean python

quickstart: env
	@$(RUN) examples/quickstart.py

test: env
	$(RUN) -m pytest $(or $(PYTEST_ARGS),tests)

lint: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# the stamp is what was installed: pins and package description as they were then
env: python
	@cat $(PINS) pyproject.toml | cmp -s - $(VENV)/installed && $(RUN) -c '' 2>/dev/null || $(MAKE) -s $(VENV)/installed

.PHONY: $(VENV)/installed
$(VENV)/installed:
	@echo "setting up $(VENV) with $(PINS); the first time it downloads some hundred megabytes or more"
	@rm -f $@
	@$(RUN) -c '' 2>/dev/null || $(INTERPRETER) -m venv --clear $(VENV)
	@# torch by its exact version before anything that asks for just any: that would take another build of it
	@$(call twice,$(PIP) $$(grep '^torch==' $(PINS)))
	@$(call twice,$(PIP) -r $(PINS))
	@$(PIP) --no-deps --no-build-isolation -e .
	@cat $(PINS) pyproject.toml > $@

# networks fail now and then
twice = $(1) || { echo "once more: $(1)"; $(1); }

python:
	@if [ -z "$(VERSION)" ]; then \
		echo "'$(PYTHON)' does not run: install Python 3.11 or 3.12, or name one: make PYTHON=/path/to/python3.11"; \
		exit 2; fi
	@if [ -z "$(PINS)" ]; then \
		echo "$(PYTHON) is Python $(VERSION), not one of $(SUPPORTED): name another: make PYTHON=/path/to/python3.11"; \
		exit 2; fi

clean:
	rm -rf .venv-py*
