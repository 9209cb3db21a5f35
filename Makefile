.DEFAULT_GOAL := help
.PHONY: help demo experiment arms test campaign lint audit docs bench clean
.DELETE_ON_ERROR:
SHELL := bash

# A python3.11 on the path can be a stub of a version manager, so it has to run.
ifndef PYTHON
PYTHON := $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
endif
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --quiet --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## */  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

# torch comes last and with its dependencies, since those differ between its CPU and CUDA builds.
# The installed torch is left alone if it is the right version. To choose a build, set pip's own
# PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL.
$(INSTALLED): requirements.lock requirements-torch.lock pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] < (3, 14) or sys.exit("Python 3.11 to 3.13 is needed, not " + sys.version.split()[0] + ": run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps --require-hashes -r requirements.lock
	$(PIP) install -r requirements-torch.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(INSTALLED)  ## STL against DCR on the embedded model and corpus: a table and a page, in minutes
	$(RUN) -m dcr.demo

# The experiment of docs/history.md: make experiment DATA=<data>. Hours on two cores; resumable.
EXPERIMENT := outputs/experiment
SOURCES := data=paper data.root=$(DATA) data.normal.count=800 data.safety.count=300 data.safety.refusals_only=true
SHORT := sft.epochs=1 sft.max_len=192 sft.lora.dropout=0 tracking.snapshots=4 dcr.nll.general_batch_size=2
# The contrasts of stage one that docs/history.md was measured with.
XSTEST := data.seemingly_toxic.source=xstest_safe data.toxic.source=xstest_unsafe data.group_holdout=0.3 dcr.epochs=12
SCORING := limit=100 gen.max_new_tokens=48
RUNS := stl-s0 stl-s1 dcr-s0 dcr-s1 recommended-s0 recommended-s1 readout-s0 readout-s1 contrasts-s0 contrasts-s1
experiment: $(INSTALLED)  ## STL, DCR, DCR with matched contrasts and STL with a readout on the real sets, two seeds
	@test -d "$(DATA)" || { echo 'error: DATA=$(DATA): no such folder; give make experiment DATA=<data>, see docs/data.md'; exit 2; }
	$(RUN) train.py -m $(SOURCES) $(SHORT) data.toxic.source=stl_safety method=stl,dcr seed=0,1 hydra.sweep.dir=$(EXPERIMENT) 'hydra.sweep.subdir=$${choice:method}-s$${choice:seed}'
	$(RUN) train.py -m $(SOURCES) $(SHORT) preset=recommended method=dcr $(XSTEST) sft.readout.steps=0 seed=0,1 hydra.sweep.dir=$(EXPERIMENT) 'hydra.sweep.subdir=recommended-s$${choice:seed}'
	$(RUN) train.py -m $(SOURCES) $(SHORT) preset=recommended method=dcr seed=0,1 hydra.sweep.dir=$(EXPERIMENT) 'hydra.sweep.subdir=contrasts-s$${choice:seed}'
	$(RUN) train.py -m $(SOURCES) $(SHORT) data.toxic.source=stl_safety method=stl sft.readout.steps=120 seed=0,1 hydra.sweep.dir=$(EXPERIMENT) 'hydra.sweep.subdir=readout-s$${choice:seed}'
	$(RUN) eval.py $(SOURCES) $(SCORING) model=smollm2_135m output=$(EXPERIMENT)/base
	for run in $(RUNS); do $(RUN) eval.py run=$(EXPERIMENT)/$$run $(SCORING) || exit 1; done
	for run in $(RUNS); do $(RUN) eval.py run=$(EXPERIMENT)/$$run snapshots=true limit=40 gen.max_new_tokens=48 || exit 1; done
	$(RUN) -m dcr.report $(EXPERIMENT)/base $(addprefix $(EXPERIMENT)/,$(RUNS)) out=$(EXPERIMENT)/report.html

# Stage one and the readout, each with and without the other: make arms DATA=<data>. Hours on two cores; resumable.
ARMS := outputs/arms
LOOK := data=final data.root=$(DATA) final.plan=docs/evidence/arms.yaml tasks=[frontier] limit=90 gen.max_new_tokens=128
BIAS := calibrate=0.8 calibration.toxic=[contrasts_toxic_heldout,xstest_unsafe] calibration.seemingly_toxic=[]
arms: $(INSTALLED)  ## four arms on five seeds, compared on the rows kept apart
	@test -d "$(DATA)" || { echo 'error: DATA=$(DATA): no such folder; give make arms DATA=<data>, see docs/data.md'; exit 2; }
	for seed in 2 3 4 5 6; do $(RUN) -m dcr.study study=arms seed=$$seed out=$(ARMS) preset=recommended $(SOURCES) sft.epochs=1 sft.max_len=192 sft.lora.dropout=0 dcr.nll.general_batch_size=2 tasks=[discernment] limit=1 || exit 1; done
	for run in $(ARMS)/*-stl-* $(ARMS)/*-dcr-*; do $(RUN) eval.py run=$$run $(LOOK) $(BIAS) || exit 1; done
	for verdict in outcome partial keyword; do $(RUN) -m dcr.frontier plan=docs/evidence/arms.yaml $(ARMS) verdict=$$verdict out=$(ARMS)/$$verdict.json || exit 1; done
	$(RUN) -m dcr.frontier plan=docs/evidence/arms.yaml $(ARMS) safety=0.65 out=$(ARMS)/lower.json

# Offline once installed; two workers, and each test file stays on one so that its fixtures are built once.
# Files come by name: xdist would begin with those of many tests, and end with the few that take longest.
test: export HF_HUB_OFFLINE := 1
test: export WANDB_MODE := offline
test: $(INSTALLED)  ## the test suite, offline
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

campaign: $(INSTALLED)  ## hostile settings, data, files, run folders and secrets; kills
	$(RUN) tests/campaign --seed 0

# pyright would ask PyPI for a newer version of itself; the locked one is meant.
lint: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
lint: $(INSTALLED)  ## ruff, pyright and the import layers
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

# Without --strict a package that could not be looked up would pass.
audit: $(INSTALLED)  ## known vulnerabilities of the locked packages, from PyPI
	$(VENV)/bin/pip-audit --strict --no-deps --disable-pip -r requirements.lock

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(INSTALLED)  ## numbers of records into the pages, and the documentation site, in site/
	$(RUN) -m dcr.record.pages README.md docs/*.md
	$(VENV)/bin/mkdocs --quiet build --strict

bench: $(INSTALLED)  ## speed against the usual alternatives: fails below nine tenths of what is recorded
	$(RUN) benchmarks

clean:  ## remove the environment, caches and the demo's results; other results in outputs/ stay
	rm -rf $(VENV) build dist site *.egg-info outputs/demo
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
