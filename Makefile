# Each target is one line that calls a command line; `make help` lists them.

PYTHON ?= python3
PY := .venv/bin/python
SHARDS ?=
# What reads takes the demo's cache and run while there are no others.
READS = eval zero-shot attention-distance generate export inspect verify card report
DUMP ?= $(if $(and $(filter $(READS),$(MAKECMDGOALS)),$(wildcard caches/demo)),$(if $(wildcard caches/embedded),embedded,demo),embedded)
STUDENT ?= demo
CACHE = caches/$(DUMP)
# A run is of a student and a cache: demo on caches/demo is runs/demo, on caches/mine it is runs/demo-mine.
RUN = runs/$(STUDENT)$(addprefix -,$(filter-out $(STUDENT),$(notdir $(CACHE))))
SHARD ?= 0
OUT = exports/$(notdir $(RUN))
PROMPT ?= The history of science is
GPUS ?=
TP ?=
RAY ?=
UNITS ?=
DEVICE ?=
ARGS ?=

# vLLM's CPU build runs on one thread unless told otherwise.
OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 1)
export OMP_NUM_THREADS DEVICE
override PROMPT := $(value PROMPT)
export PROMPT
export HF_HUB_DISABLE_TELEMETRY = 1
export VLLM_NO_USAGE_STATS = 1
# PROMPT travels by environment, literally: a prompt may hold quotes and dollar signs.

ENGINES = $(if $(GPUS),--gpus $(GPUS)) $(if $(TP),--engine.tensor_parallel $(TP)) $(if $(RAY),--ray $(RAY)) $(if $(UNITS),--units $(UNITS))
AGAIN = $(MAKE) --no-print-directory ARGS=

.DEFAULT_GOAL := help
.PHONY: help setup ready demo test test-gpu lint dump-teacher first-dump train-student eval zero-shot attention-distance generate export inspect verify card report bench experiments chaos clean student-from-teacher

help: ## show this
	@echo "make TARGET [VARIABLE=value ...]"; echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-21s %s\n", $$1, $$2 }' Makefile
	@echo; printf '  %-10s %-28s %s\n' variable default meaning \
	  DUMP '$(DUMP)' 'what to dump: a file in manifests/dumps' \
	  STUDENT '$(STUDENT)' 'what to train: a file in manifests/students' \
	  SHARDS '$(or $(SHARDS),what DUMP says)' 'training shards of the dump' \
	  CACHE '$(CACHE)' 'folder of the dump' \
	  RUN '$(RUN)' 'folder of the training run' \
	  SHARD '$(SHARD)' 'shard that inspect shows' \
	  OUT '$(OUT)' 'folder that export writes' \
	  PROMPT "$$PROMPT" 'text that generate continues' \
	  GPUS '$(or $(GPUS),all there are)' 'GPUs to use; dump-teacher uses one engine unless told, with RAY all' \
	  TP '$(or $(TP),1)' 'GPUs that dump-teacher spreads one teacher over' \
	  RAY '$(or $(RAY),none)' 'cluster that dump-teacher runs on: auto, local or HOST:PORT' \
	  UNITS '$(or $(UNITS),all)' 'shards that dump-teacher sees to: FIRST:END' \
	  DEVICE '$(or $(DEVICE),what the machine has)' 'cpu or cuda: which packages set-up installs' \
	  ARGS '$(or $(ARGS),none)' 'further options, passed on to the command'

setup: ## install pinned packages in .venv and prepare the embedded teacher and corpus
	@$(PYTHON) scripts/setup.py

ready: # the same, silent when there is nothing to do
	@$(PYTHON) scripts/setup.py --quiet

demo: ready ## a small dump, a short training, its evaluation and report
	@options=$$($(PY) -m scripts.demo_options dump) && $(AGAIN)"$$options" dump-teacher DUMP=demo SHARDS=4 CACHE=caches/demo
	@options=$$($(PY) -m scripts.demo_options train) && $(AGAIN)"$$options" train-student STUDENT=demo CACHE=caches/demo RUN=runs/demo
	@$(AGAIN) eval CACHE=caches/demo RUN=runs/demo
	@$(AGAIN) report CACHE=caches/demo RUN=runs/demo
	@$(PY) -m pipeline summary --cache caches/demo --run runs/demo

test: lint ## lint, types and every test
	$(PY) -m mypy pipeline teacher_dump student benchmarks
	$(PY) -m pytest -q $(ARGS)

test-gpu: ready ## the tests that need a GPU and those of the kernels, side by side (ARGS: names of some)
	$(PY) scripts/gpu_tests.py $(ARGS)

lint: ready ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

dump-teacher: ready ## run the teacher once over the corpus; goes on where it stopped
	$(PY) -m teacher_dump --manifest manifests/dumps/$(DUMP).yaml $(if $(SHARDS),--shards $(SHARDS)) --cache $(CACHE) $(ENGINES) $(ARGS)

first-dump: ready
	@$(if $(filter file,$(origin CACHE)),test -e $(CACHE)/manifest.json || $(AGAIN) dump-teacher,:)

train-student: first-dump ## train the student on the cache (dumped first if there is none); goes on where it stopped
	$(PY) -m student --config manifests/students/$(STUDENT).yaml --cache $(CACHE) --run $(RUN) $(if $(GPUS),--trainer.devices $(GPUS)) $(ARGS)

student-from-teacher: STUDENT := $(if $(filter file,$(origin STUDENT)),recommended,$(STUDENT))
student-from-teacher: first-dump ## begin a student with its teacher's weights (STUDENT: recommended, RUN: runs/STUDENT-start)
	$(PY) -m student.from_teacher --student manifests/students/$(STUDENT).yaml --cache $(CACHE) --run $(if $(filter file,$(origin RUN)),runs/$(STUDENT)-start,$(RUN)) $(ARGS)

eval: ready ## measure the student on held-out shards
	$(PY) -m student.evaluate --run $(RUN) --cache $(CACHE) $(ARGS)

zero-shot: ready ## ask the student questions it was not trained for: LAMBADA, HellaSwag, PIQA, ...
	$(PY) -m student.zero_shot --run $(RUN) $(ARGS)

attention-distance: ready ## how much of the teacher's attention the student learned, against baselines
	$(PY) -m student.attention_distance --run $(RUN) --cache $(CACHE) $(ARGS)

generate: ready ## let the student continue PROMPT
	@$(PY) -m student.generate --run $(RUN) --prompt_from_env PROMPT $(ARGS)

export: ready ## write the student as a Hugging Face folder (OUT), with its own code and a model card
	@$(PY) -m student.export --run $(RUN) --out $(OUT) $(if $(filter file,$(origin CACHE)),,--cache $(CACHE)) $(ARGS)

inspect: ready ## what a shard holds, positions decoded to text
	@$(PY) -m pipeline inspect --cache $(CACHE) --shard $(SHARD) $(ARGS)

verify: ready ## check every byte and number of a cache
	@$(PY) -m pipeline verify --cache $(CACHE) $(ARGS)

card: ready ## write the README of a cache: a data set card that datasets.load_dataset reads
	@$(PY) -m pipeline card --cache $(CACHE) $(ARGS)

report: ready ## one HTML page on cache and run
	@$(PY) -m pipeline report --cache $(CACHE) --run $(RUN) $(ARGS)

bench: ready ## measure: storage, and on a GPU kernels and throughput, up to an hour; writes benchmarks/results
	$(PY) -m benchmarks

experiments: ready ## train and evaluate the arms of manifests/experiments that have no figures yet (wants a GPU)
	$(PY) -m benchmarks.quality $(ARGS)

chaos: ready ## harm caches, checkpoints and writers on purpose and count what goes wrong (46 minutes on 2 cores)
	PYTHONPATH=.:tests $(PY) -m chaos --json benchmarks/results/chaos.json $(ARGS)

clean: ## remove what tools left behind; environment, data, caches and runs stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info && find pipeline teacher_dump student benchmarks tests scripts -name __pycache__ -prune -exec rm -rf {} +
