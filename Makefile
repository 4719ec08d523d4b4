# Every target sets itself up: a virtual environment in .venv, pinned packages, the compiled extension.
# Needs python3 (3.10+) with venv and headers, make and g++. pip's own configuration decides where packages come from.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRITONS := $(shell cat tests/kernels/tritons.txt)
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
CSRC := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name 'CMakeLists.txt' -o -name '*.cmake' \))
CUDA_SOURCES := $(wildcard cmake/* csrc/cuda/*) sparsecomp/backends/gpu/cutlass/build.py sparsecomp/backends/gpu/cutlass/config.py
CXX_SOURCES := $(filter %.cpp %.hpp %.h,$(CSRC)) $(wildcard tests/csrc/*.[ch]pp)

.DEFAULT_GOAL := help
.PHONY: help setup tritons demo quick test test-all defaults eager-off lint bench docs sanitize nightly clean

# Times are those of two idle cores once the environment is there; making it takes some minutes more.
help:
	@echo 'make demo      the whole job on a real model, beside other engines and dense int8 (under 5 minutes)'
	@echo 'make quick     the unit tests of the Python package; nothing is compiled (some 2 minutes)'
	@echo 'make test      the tests (some 15 minutes)'
	@echo 'make test-all  all that a change must pass: lint, every test once, the reruns below (under 40 minutes)'
	@echo 'make lint      ruff, mypy --strict, clang-format, clang-tidy (3 minutes)'
	@echo 'make defaults  the tests again, while torch has another default device and dtype (4 minutes)'
	@echo 'make eager-off the tests of layers again, with every call through the dispatcher of torch (1 minute)'
	@echo 'make sanitize  the C++ tests under AddressSanitizer and UBSan, with their whole output (4 minutes)'
	@echo 'make nightly   10^5 random products against their twins on every instruction set here; every Triton'
	@echo 'make bench     this machine: sparse against the best dense engine, each ratio beside its bound (30 minutes)'
	@echo 'make docs      the API reference, and the outputs under the code of the pages, written anew (5 minutes)'
	@echo 'make tritons   the oldest and the newest Triton, for the GPU tests; make test-all includes it'
	@echo 'make .cutlass  the headers of CUTLASS, to be carried along to a GPU machine without a network (docs/gpu.md)'
	@echo 'make setup     the environment alone; every target begins with it'
	@echo 'make clean     remove everything the other targets made'

setup: $(READY)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo 'error: $(PYTHON) is not installed; on Debian or Ubuntu: apt install python3 python3-venv python3-dev' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $$($(PYTHON) --version) is too old, 3.10 or newer is needed; name another with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo 'error: $(PYTHON) has no venv module; on Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Build tools live in the environment, pinned, so that a change in csrc is rebuilt in place and without a network.
$(READY): $(BIN)/python pyproject.toml constraints.txt CMakeLists.txt $(CSRC) $(CUDA_SOURCES)
	@command -v $${CXX:-g++} >/dev/null || { echo "error: $${CXX:-g++} is not installed; on Debian or Ubuntu: apt install g++" >&2; exit 1; }
	@$(BIN)/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo 'error: Python.h is missing; on Debian or Ubuntu: apt install python3-dev' >&2; exit 1; }
	$(PIP) install -q -c constraints.txt scikit-build-core cmake ninja
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# The other dense engines that make bench compares with.
$(VENV)/.bench: $(READY)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[bench]'
	@touch $@

# The oldest and the newest Triton that the GPU kernels are compiled with, beside the one that torch wants. Without a
# network their tests are skipped.
tritons: $(READY)
	@for version in $(TRITONS); do \
	  folder=$(VENV)/tritons/$$version; \
	  [ -d $$folder ] || { rm -rf $$folder.part && \
	    $(PIP) --retries 1 --timeout 15 install -q --no-deps --target $$folder.part triton==$$version && \
	    mv $$folder.part $$folder; } || echo "warning: Triton $$version cannot be installed; its tests are skipped" >&2; \
	done

# Another pattern: make demo ARGS='--pattern 8:16'
demo: $(READY)
	$(BIN)/python -m bench.demo $(ARGS)

PYTEST := $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder
# a folder of tests belongs to make quick if the package has a room of its name; a slow test in it is marked
ROOMS := $(patsubst sparsecomp/%/__init__.py,tests/%,$(wildcard sparsecomp/*/__init__.py))
quick: $(READY)
	$(PYTEST) -m 'not slow and not exhaustive' $(wildcard $(ROOMS) tests/house tests/test_*.py)

test: $(READY)
	$(PYTEST) -m 'not exhaustive'

test-all: lint tritons
	$(PYTEST)
	$(MAKE) defaults eager-off

# Only tests in which the package makes tensors; a command and what times engines have processes to themselves.
defaults: $(READY)
	$(PYTEST) --other-defaults $(filter-out tests/cli tests/benchmark tests/engines,$(wildcard $(ROOMS) tests/test_*.py))

# What a layer does on a torch that is not known: its tests, without the way past the dispatcher.
eager-off: $(READY)
	SPARSECOMP_EAGER=off $(PYTEST) tests/nn tests/modules tests/files tests/test_compiler.py \
	  tests/backends/test_registry.py tests/backends/test_cpu_blocks.py tests/backends/test_torch_backends.py \
	  --ignore tests/nn/test_eager_hidden.py --ignore tests/nn/test_eager_binding.py \
	  --ignore tests/nn/test_following.py --ignore tests/nn/test_training.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/tidy -G Ninja -DSPARSECOMP_PYTHON=OFF -DCMAKE_EXPORT_COMPILE_COMMANDS=ON >/dev/null
	@# the Python module is left out: its findings are the idioms of the C API; so is what other processors compile
	printf '%s\n' $(filter-out csrc/eager/% csrc/python/% $(wildcard csrc/cpu/*/arm/*),$(filter %.cpp,$(CSRC))) | xargs -P2 -n1 $(BIN)/clang-tidy -quiet -p build/tidy

# Pass options through ARGS, as in: make bench ARGS='--shapes 4096x4096 --batches 1,8'
bench: $(VENV)/.bench
	$(BIN)/python -m sparsecomp.cli.main bench --output auto $(or $(ARGS),--goals)

# One page alone: make docs ARGS=README.md; the reference alone: make docs ARGS=reference
docs: $(READY)
	$(BIN)/python docs/generate.py $(ARGS)

# The same programs run in make test-all where the compiler has the sanitizers; here its whole output is shown.
sanitize: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cmake --workflow --preset sanitize

# Another seed every day; a failure prints the line that repeats its case alone. Exit code 77: not on this machine.
NIGHTLY_COUNT ?= 100000
NIGHTLY_SEED ?= $(shell date +%Y%m%d)
NIGHTLY_OFF := -DSPARSECOMP_PYTHON=OFF -DSPARSECOMP_ORT=OFF
nightly: tritons
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/nightly -G Ninja $(NIGHTLY_OFF) -DSPARSECOMP_TESTS=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/nightly
	printf '%s\n' avx512_bf16 avx512 avx2_vnni avx2 neon_dotprod neon reference | xargs -P2 -I @ sh -c \
	  'export SPARSECOMP_ISA=@; for each in nm_test int8_test "random_test --count $(NIGHTLY_COUNT) --seed $(NIGHTLY_SEED)"; do \
	  build/nightly/$$each || [ $$? -eq 77 ] || exit 1; done'
	@# the whole compile matrix with every Triton; make test-all takes a part of it for the others
	for version in $(TRITONS); do \
	  PYTHONPATH=$(VENV)/tritons/$$version SPARSECOMP_TEST_TRITON=$$version \
	  $(BIN)/python -m pytest -q -n auto tests/kernels -k machine_code || exit 1; \
	done

# bench/gpu.sh takes them from here: 26 MB, ignored by git
CUTLASS_WHEEL := nvidia-cutlass==4.2.0.0
.cutlass: | $(READY)
	rm -rf $@ build/cutlass-wheel
	$(PIP) install -q --no-deps --no-compile --target build/cutlass-wheel $(CUTLASS_WHEEL)
	mkdir $@
	mv build/cutlass-wheel/cutlass_library/source/include $@/include
	rm -rf build/cutlass-wheel

clean:
	rm -rf $(VENV) .cutlass build demo-out dist
