# SAISA. `make help` lists what there is; every target is `python -m <module>` underneath.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo compare test test-gpu bench-gpu bench-latency gpu-report trace roofline mutants soak lint shards verify report stream-check import-hf tiny-base train preview submit export evaluate chat layer-contribution flops-table test-hf test-transformers5 test-lmms test-energon clean

PYTHON := .venv/bin/python
# Libraries warn at import about what is not installed here; our own messages are not warnings.
export PYTHONWARNINGS := ignore::UserWarning,ignore::DeprecationWarning,ignore::FutureWarning,ignore::SyntaxWarning
# Images often forbid Python to keep what it compiles; then every process compiles thousands of modules, for 15 seconds.
export PYTHONDONTWRITEBYTECODE :=
# Without a GPU, torch warns of a CUDA toolkit that it finds; where these are empty it looks for none.
ifeq ($(wildcard /dev/nvidiactl /dev/dxg),)
export CUDA_HOME :=
export CUDA_PATH :=
endif
TRANSFORMERS5 := tests/model tests/pipeline/test_step.py tests/pipeline/test_against_torch.py
UV_VERSION := 0.13.8

# $(call need,A B): stops with one line if a variable that the target needs is not given.
need = $(foreach name,$(1),$(if $($(name)),,$(error $(name)= is missing; `make help` shows what $@ takes)))

help: ## list the targets
	@echo 'ARGS="..." adds options to what a target runs; `python -m <module> --help` lists them.'
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)$$/  make \1\t\2/' | expand -t 20

setup: .venv/.ready ## build .venv from requirements.lock (what needs it does this by itself, once)

.venv/.ready: requirements.lock benchmarks/fake_gpu/requirements.txt
	@python=$$(command -v python3.12 || command -v python3); \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
	  { echo "error: $$python is not Python 3.12; install Python 3.12 and try again" >&2; exit 1; }; \
	$$python -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(PYTHON) -m uv pip install --quiet --python $(PYTHON) -r requirements.lock
	$(PYTHON) -m uv pip install --quiet --no-deps --target .venv/transformer-engine -r benchmarks/fake_gpu/requirements.txt
	@touch $@

demo: setup ## the whole story on two CPU cores: data, shards, stage 1, stage 2, export, questions
	$(PYTHON) -m orchestration.demo $(ARGS)

compare: setup ## [ARGS="--quick --only saisa,naavit"]: the architectures of the paper, trained and compared on drawn shapes
	$(PYTHON) -m orchestration.compare $(ARGS)

# Three processes on two cores: many tests wait for processes of their own.
test: setup ## the CPU tests
	$(PYTHON) -m pytest -n 3 --dist worksteal -m "not slow" $(ARGS)

# The GPU tests are left out of all others: pyproject.toml ignores their folder.
test-gpu: setup ## [ARGS="-k fp8"]: kernels, layers and training runs on one GPU against their references
	SAISA_TEST_GPU=1 $(PYTHON) -m pytest -o addopts="-q --import-mode=importlib" tests/gpu $(ARGS)

bench-gpu: setup ## [ARGS="--json numbers.json"]: a layer against LLaVA's, attention kernels, FP8 and MFU at 7B widths, on one GPU
	$(PYTHON) -m benchmarks.gpu $(ARGS)

bench-latency: setup ## [ARGS="--hidden-size 4096 --layers 32 --device cuda"]: how long saisa and llava read a prompt with an image, CPU or GPU
	$(PYTHON) -m benchmarks.latency $(ARGS)

trace: setup ## CONFIG=x.yaml [ARGS="--world 64 --samples 8"]: what a step asks of a GPU that is not there: memory, kernels, waits
	$(call need,CONFIG)
	@$(PYTHON) -m benchmarks.fake_gpu --config $(CONFIG) $(ARGS)

roofline: setup ## CONFIG=x.yaml [ARGS="--world 8 --packs 2"]: the time of such a step on paper, line by line, and its MFU
	$(call need,CONFIG)
	@$(PYTHON) -m benchmarks.roofline --config $(CONFIG) $(ARGS)

gpu-report: setup ## [ARGS="--dry-run --out folder"]: what one GPU does with all this, in nine minutes: docs/gpu-report.md and .json
	$(PYTHON) -m benchmarks.gpu_report $(ARGS)

mutants: setup ## [ARGS="--only pipeline/step"]: plants one-line mistakes in a copy of the code; each must fail a test (20 minutes)
	$(PYTHON) -m tests.mutants $(ARGS)

soak: setup ## longer proofs: slow tests, kill loops, mutants (an hour)
	$(PYTHON) -m pytest -m slow
	$(PYTHON) -m tests.mutants
	$(PYTHON) -m tests.soak.kill_shards $(ARGS)
	$(PYTHON) -m tests.soak.share_cache $(ARGS)
	$(PYTHON) -m tests.soak.kill_training $(ARGS)

lint: setup ## ruff and pyright
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright

shards: setup ## DATA=x.json IMAGES="dir-zip-or-url ..." OUT=dir-or-url [WORKERS=n]: rows (JSON, or Parquet with the images inside) to WebDataset tars, on Ray
	$(call need,DATA OUT)
	$(PYTHON) -m data_prep.shards --data $(DATA) $(foreach root,$(IMAGES),--images $(root)) --out $(OUT) $(if $(WORKERS),--workers $(WORKERS)) $(ARGS)

verify: setup ## OUT=dir-or-url [WORKERS=n]: re-read every byte of a shard directory and name what is damaged
	$(call need,OUT)
	$(PYTHON) -m data_prep.verify $(OUT) $(if $(WORKERS),--workers $(WORKERS)) $(ARGS)

report: setup ## OUT=dir-or-url: one HTML page to look at a shard directory
	$(call need,OUT)
	$(PYTHON) -m data_prep.report $(OUT) $(ARGS)

stream-check: setup ## SHARDS=dir-or-url [CACHE=dir]: shards read by number and by webdataset are the same, sample for sample
	$(call need,SHARDS)
	$(PYTHON) -m pipeline.shards.stream_check $(SHARDS) $(if $(CACHE),--cache $(CACHE)) $(ARGS)

import-hf: setup ## LLM=dir VISION=dir OUT=dir [TEMPLATE=v1], or RELEASE=dir [VISION=dir] OUT=dir: language model and encoder to a base; a LLaVA-1.5 or SAISA to an export
	$(call need,OUT)
	$(PYTHON) -m pipeline.import_hf $(if $(LLM),--llm $(LLM)) $(if $(RELEASE),--release $(RELEASE)) $(if $(VISION),--vision $(VISION)) \
	  $(if $(TEMPLATE),--template $(TEMPLATE)) --out $(OUT) $(ARGS)

tiny-base: setup ## DATA=x.json OUT=dir [TOKENIZER=dir]: a tiny random base of JSON or Parquet rows, to try your own data on a CPU
	$(call need,DATA OUT)
	$(PYTHON) -m orchestration.tiny_base --data $(DATA) --out $(OUT) $(if $(TOKENIZER),--tokenizer $(TOKENIZER)) $(ARGS)

NPROC ?= 1
TORCHRUN = $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --standalone --nproc-per-node $(NPROC))
# With several processes the configuration is looked at first, so that an error in it is one line and not one a process.
train: setup ## CONFIG=x.yaml [NPROC=2] [ARGS="a.b=c"]: one stage, under torchrun if NPROC > 1
	$(call need,CONFIG)
	@[[ "$(NPROC)" =~ ^[1-9][0-9]*$$ ]] || { echo "error: NPROC=$(NPROC) must be a number of processes" >&2; exit 1; }
	@$(if $(TORCHRUN),$(PYTHON) -m pipeline.train --config $(CONFIG) $(ARGS) --print-config > /dev/null)
	$(PYTHON) $(TORCHRUN) -m pipeline.train --config $(CONFIG) $(ARGS)

# Code travels with the job; relative paths in the configuration mean this folder, which every node must see.
ADDRESS ?= http://127.0.0.1:8265
JOB_PYTHON ?= $(CURDIR)/$(PYTHON)
JOB_CONFIG_pretrain := configs/demo-stage1.yaml
JOB_CONFIG_finetune := configs/demo-stage2.yaml
JOB_ENV := {"env_vars": {"PYTHONWARNINGS": "$(PYTHONWARNINGS)"}}
# Ray 2.60 protects a cluster with a token as soon as there is one in the home folder; then its clients need it too.
AUTH := $(if $(wildcard $(HOME)/.ray/auth_token),RAY_AUTH_MODE=$${RAY_AUTH_MODE:-token})
submit: setup ## JOB=pretrain|finetune [CONFIG=x.yaml] [ADDRESS=http://head:8265] [NPROC=n]: the same on a Ray cluster
	$(call need,JOB)
	@host=$(ADDRESS); host=$${host#*://}; (exec 3<>/dev/tcp/$${host%%:*}/$${host##*:}) 2> /dev/null || \
	  { echo "error: no Ray cluster answers at ADDRESS=$(ADDRESS); name yours, or start one: .venv/bin/ray start --head" >&2; exit 1; }
	@$(PYTHON) -m orchestration.submit_check
	$(AUTH) $(PYTHON) -m ray.scripts.scripts job submit --address $(ADDRESS) --working-dir . \
	  --runtime-env-json '$(JOB_ENV)' -- \
	  $(JOB_PYTHON) -m orchestration.ray_train --config $(or $(CONFIG),$(JOB_CONFIG_$(JOB)),$(error JOB=$(JOB) is unknown; use pretrain or finetune, or give CONFIG=)) --root $(CURDIR) \
	  --num-workers $(NPROC) $(ARGS)

STEP ?= 0
RANKS ?= 1
preview: setup ## CONFIG=x.yaml [STEP=n] [RANKS=n] [ARGS="--html runs/page.html"]: what each rank would see at a step
	$(call need,CONFIG)
	@$(PYTHON) -m pipeline.data.preview --config $(CONFIG) --step $(STEP) --ranks $(RANKS) $(ARGS)

export: setup ## CKPT=run-or-checkpoint OUT=dir [FORMAT=llava-hf|llava]: a training checkpoint to a self-contained Hugging Face folder
	$(call need,CKPT OUT)
	$(PYTHON) -m pipeline.export --checkpoint $(CKPT) --out $(OUT) $(if $(FORMAT),--format $(FORMAT)) $(ARGS)

evaluate: setup ## MODEL=dir DATA=x.json [IMAGES=dir-zip-or-url]: score an exported folder on LLaVA-format questions (JSON or Parquet)
	$(call need,MODEL DATA)
	$(PYTHON) -m pipeline.evaluation.evaluate --model $(MODEL) --data $(DATA) $(if $(IMAGES),--images $(IMAGES)) $(ARGS)

chat: setup ## MODEL=dir IMAGE=file [ARGS='--question "..."']: talk to an exported folder
	$(call need,MODEL IMAGE)
	$(PYTHON) -m pipeline.evaluation.chat --model $(MODEL) --image $(IMAGE) $(ARGS)

layer-contribution: setup ## MODEL=dir DATA=x.json OUT=dir [IMAGES=dir-zip-or-url] [ARGS="--num-frozen 19"]: what each layer of an exported llava contributes, and a shortv without the least
	$(call need,MODEL DATA OUT)
	$(PYTHON) -m pipeline.layer_contribution --model $(MODEL) --data $(DATA) --out $(OUT) $(if $(IMAGES),--images $(IMAGES)) $(ARGS)

flops-table: setup ## [ARGS="--figure figure-4.png --json flops.json"]: the paper's inference FLOPs, its formulas', and our own
	@$(PYTHON) -m pipeline.flops_table $(ARGS)

test-hf: setup ## exported folders load, answer and save on transformers 4.57 and 5, each in its own environment
	@for n in 4 5; do \
	  test -x .envs/hf$$n/bin/python || $(PYTHON) -m uv venv -q --python $(PYTHON) .envs/hf$$n || exit 1; \
	  $(PYTHON) -m uv pip install -q --python .envs/hf$$n -r tests/hf_compat/requirements-transformers$$n.txt || exit 1; \
	done
	rm -rf .envs/hf_compat
	$(PYTHON) -m tests.hf_compat.make_folder .envs/hf_compat
	@for n in 5 4; do \
	  (cd .envs/hf_compat && env -u PYTHONPATH HF_HOME=$$PWD/home$$n HF_HUB_OFFLINE=1 ../hf$$n/bin/python -m pytest -q \
	    -p no:cacheprovider -c /dev/null --rootdir=. check_*.py) || exit 1; \
	done

test-transformers5: setup ## the model, the step and the GPU report on transformers 5 and numpy 2.5, and with few other packages
	@test -x .envs/transformers5/bin/python || $(PYTHON) -m uv venv -q --python $(PYTHON) .envs/transformers5
	@$(PYTHON) -m uv pip install -q --python .envs/transformers5 -r tests/transformers5/requirements.txt
	@# What it lacks it finds in .venv, behind its own packages: torch is there once.
	@echo $(CURDIR)/.venv/lib/python3.12/site-packages > .envs/transformers5/lib/python3.12/site-packages/venv.pth
	.envs/transformers5/bin/python -m pytest $(TRANSFORMERS5) $(ARGS)
	SAISA_TEST_GPU=1 .envs/transformers5/bin/python -m pytest -o addopts="-q --import-mode=importlib" -p tests.gpu.few_packages \
	  tests/gpu --collect-only -q

test-lmms: setup ## lmms-eval, unmodified, scores an exported folder on a local task, in an environment of its own
	@test -x .envs/lmms/bin/python || $(PYTHON) -m uv venv -q --python $(PYTHON) .envs/lmms
	@$(PYTHON) -m uv pip install -q --python .envs/lmms -r tests/lmms_compat/requirements.txt
	rm -rf .envs/lmms_compat
	$(PYTHON) -m tests.lmms_compat.make_task .envs/lmms_compat
	@for n in 1 4; do \
	  (cd .envs/lmms_compat && env -u PYTHONPATH HF_HOME=$$PWD/home HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 CUDA_VISIBLE_DEVICES= \
	    ../lmms/bin/python -m lmms_eval --model huggingface --batch_size $$n --tasks saisa_local --include_path $$PWD/task \
	    --model_args pretrained=$$PWD/export,device=cpu,device_map=cpu,trust_remote_code=True \
	    --log_samples --output_path $$PWD/batch-size-$$n) || exit 1; \
	  $(PYTHON) -m tests.lmms_compat.check_answers .envs/lmms_compat/expected.json .envs/lmms_compat/batch-size-$$n || exit 1; \
	done

test-energon: setup ## megatron-energon prepares and reads the shards, in an environment of its own
	@test -x .envs/energon/bin/python || $(PYTHON) -m uv venv -q --python $(PYTHON) .envs/energon
	@$(PYTHON) -m uv pip install -q --python .envs/energon -r tests/energon_compat/requirements.txt
	rm -rf .envs/energon_compat
	$(PYTHON) -m tests.energon_compat.make_shards .envs/energon_compat
	.envs/energon/bin/python tests/energon_compat/read_shards.py .envs/energon_compat/shards

clean: ## remove caches and the environments of test-hf, test-transformers5, test-lmms and test-energon; runs and .venv stay
	rm -rf .pytest_cache .ruff_cache .envs
