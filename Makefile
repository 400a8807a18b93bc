# Everything a developer or a curious visitor runs. Needs python3, a C++ compiler and make; the rest goes into .venv.
#
#   make demo        fine-tune a small model with QLoRA on this machine and show before and after
#   make test        the tests (under 10 minutes on 2 cores)
#   make test-extra  the slow tests, the op tests again under every instruction set, test-triton and test-native
#   make test-triton the op tests over the Triton kernels, in Triton's interpreter (no GPU needed)
#   make compile-report compile every Triton kernel for every supported GPU: registers, shared memory, occupancy
#   make gpu-check   on a machine with a GPU: the whole GPU test matrix, then the GPU benchmark, in 8 minutes
#   make test-native a million calls of the CPU kernels, without Python, under the address and undefined sanitizers;
#                    then the CUDA kernels, with a GPU emulated on the host
#   make test-oldest the tests of what touches transformers, peft and trl, with the oldest of them that are supported
#   make lint        ruff, and clang-format over the native sources
#   make format      rewrite what lint complains about
#   make bench       our kernels against their peers
#   make wheel       build dist/*.whl
#   make clean       remove what was built (clean-venv also removes .venv)
#
# PYTHON=python3.12 picks the interpreter, PIP_FLAGS="..." is passed to every pip install, PYTEST_FLAGS="-k nf4" to pytest,
# WORKERS=2 is how many processes of pytest share the machine (0: the one you started, for a debugger),
# FUZZ_FLAGS="--calls 50000000 --seed 2" to the program behind test-native, COMPILE_FLAGS="--capability 86 --json F" to
# compile-report, and GPU_CHECK_FLAGS="--wheels DIR --out DIR --dry-run" to gpu-check, which runs on GPU_PYTHON.

SHELL := /bin/bash
PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# A file's tests stay in one process, so that what they share is made once.
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadfile
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
FUZZ_FLAGS ?= --calls 1000000
GPU_PYTHON ?= python3
GPU_SITE := build/gpu-check/site
NATIVE := $(shell find csrc -type f -not -name ".*") CMakeLists.txt cmake/isa.cmake
CXX_FILES = $(shell find csrc tests/native -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' \) 2>/dev/null)
OPS = $(patsubst pyfinetune/ops/%.py,%,$(wildcard pyfinetune/ops/[a-z]*.py))
OP_TESTS = $(sort $(foreach op,$(OPS),$(wildcard tests/test_$(op)*.py)) tests/test_lora_thin.py tests/test_row_kernels.py)
# The ops that have Triton kernels, and their tests.
TRITON_OPS = $(filter $(OPS),$(patsubst kernels/%.py,%,$(wildcard kernels/*.py)))
TRITON_TESTS = $(sort $(foreach op,$(TRITON_OPS),$(wildcard tests/test_$(op)*.py tests/test_kernels_$(op)*.py)) \
  $(wildcard tests/test_row_kernels_triton.py tests/test_kernels_candidates.py))

# The binaries of the venv come first, so that cmake and ninja from pip are found by the build.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: all demo test test-extra test-native test-triton test-oldest compile-report gpu-check lint format bench wheel clean \
  clean-venv
all: $(VENV)/.installed

# torch goes first and by its exact version: an unpinned torch may resolve to a build several gigabytes larger.
$(VENV)/.tools: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) scikit_build_core pybind11 cmake ninja
	touch $@

$(VENV)/.installed: $(VENV)/.tools pyproject.toml $(NATIVE)
	$(PIP) --no-build-isolation -e '.[dev]'
	# The import hook of the editable install finds every module; the folders it also puts on sys.path would let
	# kernels/ shadow Hugging Face's package of that name.
	sed -i '/^\//d' $(VENV)/lib/python*/site-packages/_editable_skbc_pyfinetune.pth
	touch $@

demo: $(VENV)/.installed
	$(BIN)/pyfinetune demo

test: $(VENV)/.installed
	$(PYTEST) $(PYTEST_FLAGS)

# Without the tests of an op and its reference, which no backend changes: `make test` has run them.
OF_BACKENDS := -k "not gradcheck and not opcheck and not compile and not fullgraph and not reference_is and not reference_in"

# pytest exits with 5 when nothing was collected, which is not a failure here. The first instruction set is the best
# one, which `make test` has run.
test-extra: $(VENV)/.installed test-native test-triton
	$(PYTEST) -m slow $(PYTEST_FLAGS) || [ $$? -eq 5 ]
	set -e; for isa in $$($(BIN)/python -c 'from pyfinetune._native import native; print(*native.isas()[1:])'); do \
	  [ -n "$(OP_TESTS)" ] || break; \
	  echo "op tests with PYFINETUNE_CPU_ISA=$$isa"; \
	  PYFINETUNE_CPU_ISA=$$isa $(PYTEST) $(OP_TESTS) $(OF_BACKENDS) $(PYTEST_FLAGS) || [ $$? -eq 5 ]; \
	done

# The interpreter's products are numpy's, whose threads would fight torch's for the cores.
test-triton: $(VENV)/.installed
	[ -z "$(TRITON_TESTS)" ] || TRITON_INTERPRET=1 PYFINETUNE_TEST_BACKENDS=triton OPENBLAS_NUM_THREADS=1 \
	  $(PYTEST) $(TRITON_TESTS) $(OF_BACKENDS) $(PYTEST_FLAGS) || [ $$? -eq 5 ]

compile-report: $(VENV)/.installed
	$(BIN)/python -m pyfinetune.bench.compile_report $(COMPILE_FLAGS)

# On the GPU machine's own Python, with the packages that are there: nothing is fetched, and no venv is made. The build
# counts among the 8 minutes; a second one compiles only what has changed.
gpu-check:
	started=$$(date +%s); set -e; \
	$(GPU_PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation \
	  --no-cache-dir --config-settings=build-dir=build/gpu-check/native --upgrade --target $(GPU_SITE) .; \
	PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(GPU_SITE)$${PYTHONPATH:+:$$PYTHONPATH} \
	  $(GPU_PYTHON) -m pyfinetune.bench.gpu_check --started $$started $(GPU_CHECK_FLAGS)

# OpenMP's threads would spin while they wait, on cores that others could use.
test test-extra test-triton test-native test-oldest: export OMP_WAIT_POLICY := passive
test-native: $(VENV)/.tools
	cmake -S tests/native -B build/native -G Ninja
	cmake --build build/native
	build/native/fuzz_kernels --self-test
	build/native/fuzz_kernels $(FUZZ_FLAGS)
	build/native/fuzz_kernels --op gpu_nf4 --calls 2000
	build/native/fuzz_kernels --op gpu_lora_linear --calls 400

# The oldest versions that pyproject.toml admits, in a venv of their own; torch stays the tested one.
OLDEST := .venv-oldest
OLDEST_PIP := $(OLDEST)/bin/python -m pip install --disable-pip-version-check -c constraints-oldest.txt $(PIP_FLAGS)
OLDEST_TESTS = $(wildcard tests/test_patch*.py tests/test_peft_lora.py tests/test_verify.py tests/test_run_script.py) \
  tests/test_load_4bit.py tests/test_linear4bit.py tests/test_merge_dense.py
# What these versions say of newer ones below them is not ours to mend.
OLDEST_WARNINGS := -W ignore::FutureWarning -W "ignore:Could not find a config file:UserWarning"

$(OLDEST)/.installed: constraints-oldest.txt pyproject.toml $(NATIVE)
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST_PIP) "$$(grep '^torch==' constraints-oldest.txt)"
	$(OLDEST_PIP) scikit_build_core pybind11 cmake ninja
	PATH="$(CURDIR)/$(OLDEST)/bin:$$PATH" $(OLDEST_PIP) --no-build-isolation -e '.[test]'
	sed -i '/^\//d' $(OLDEST)/lib/python*/site-packages/_editable_skbc_pyfinetune.pth
	touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/pytest -n $(WORKERS) --dist loadfile $(OLDEST_TESTS) $(OLDEST_WARNINGS) $(PYTEST_FLAGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.installed
	$(BIN)/pyfinetune bench $(BENCH_FLAGS)

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation -w dist .

clean:
	rm -rf build dist wheelhouse .pytest_cache .ruff_cache .hypothesis .benchmarks demo-output
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

clean-venv: clean
	rm -rf $(VENV)
