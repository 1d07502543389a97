# Every target is one line that calls the command line; `make help` lists them.
SHARDS  ?= 64
DUMP    ?= embedded
STUDENT ?= demo
CACHE   ?= caches/$(DUMP)
RUN     ?= runs/$(STUDENT)
SHARD   ?= 0
PROMPT  ?=
DEVICE  ?=
ARGS    ?=
export DEVICE PROMPT
export OMP_NUM_THREADS ?= $(shell nproc)
export HF_HUB_DISABLE_TELEMETRY = 1
export VLLM_NO_USAGE_STATS = 1
export TOKENIZERS_PARALLELISM = false

PY := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint dump-teacher train-student eval generate inspect verify report clean

help: ## this list
	@echo "Targets:"; grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18
	@printf '%s\n' "" "Variables (make TARGET NAME=value):" "  SHARDS=$(SHARDS)   training shards" "  DUMP=$(DUMP)   a file of manifests/dumps" "  STUDENT=$(STUDENT)   a file of manifests/students" "  CACHE=$(CACHE)   folder of the cache" "  RUN=$(RUN)   folder of the student's run" "  SHARD=$(SHARD)   shard to inspect" "  PROMPT=\"...\"   text to go on with" "  DEVICE=cpu|cuda   overrides what set-up finds" "  ARGS=\"...\"   further options of the command (see --help)" | expand -t 18

setup: ## virtual environment, embedded teacher and corpus; a second time it only looks
	@python3 scripts/setup.py --quiet

demo: setup ## everything, small: dump, train, evaluate, report; about 12 minutes on 2 cores
	@$(MAKE) --no-print-directory dump-teacher DUMP=demo SHARDS=4 CACHE=caches/demo
	@$(MAKE) --no-print-directory train-student STUDENT=demo CACHE=caches/demo RUN=runs/demo
	@$(MAKE) --no-print-directory eval CACHE=caches/demo RUN=runs/demo
	@$(MAKE) --no-print-directory report CACHE=caches/demo RUN=runs/demo
	@$(PY) -m pipeline summary --cache caches/demo --run runs/demo

test: lint ## lint, types and every test
	$(PY) -m pytest -q $(ARGS)

lint: setup ## lint and types alone
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy pipeline teacher_dump student

dump-teacher: setup ## run the teacher over a corpus into CACHE
	@$(PY) -m teacher_dump --manifest manifests/dumps/$(DUMP).yaml --shards $(SHARDS) --cache $(CACHE) $(ARGS)

train-student: setup | $(CACHE)/manifest.json ## train STUDENT from CACHE into RUN
	@$(PY) -m student --config manifests/students/$(STUDENT).yaml --cache $(CACHE) --run $(RUN) $(ARGS)

$(CACHE)/manifest.json: | setup
	@$(PY) -m teacher_dump --manifest manifests/dumps/$(DUMP).yaml --shards $(SHARDS) --cache $(CACHE)

eval: setup ## evaluate RUN on the held-out shards of CACHE
	@$(PY) -m student.evaluate --run $(RUN) --cache $(CACHE) $(ARGS)

generate: setup ## let RUN go on with PROMPT
	@$(PY) -m student.generate --run $(RUN) --prompt_from_env PROMPT $(ARGS)

inspect: setup ## look into shard SHARD of CACHE
	@$(PY) -m pipeline inspect --cache $(CACHE) --shard $(SHARD) $(ARGS)

verify: setup ## check every byte and value of CACHE
	@$(PY) -m pipeline verify --cache $(CACHE) $(ARGS)

report: setup ## one HTML file about CACHE and RUN
	@$(PY) -m pipeline report --cache $(CACHE) --run $(RUN) $(ARGS)

clean: ## remove the environment and the embedded data; caches and runs stay
	rm -rf .venv data
