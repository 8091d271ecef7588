# `make demo` and `make test` need Python >= 3.10 with venv, a C++ compiler and make; they install the rest into .venv.
# `make` alone lists what else there is.
#
# PYTHON=/path/to/python  works in that interpreter's environment instead, installs nothing, and says what it lacks
# TORCH=torch==2.14.1     another torch for .venv (>= 2.10)
# CUDA=on|off             `make build`, `make wheel`: with CUDA kernels whatever torch is, or without; auto unless told.
#                         nvcc comes from the machine, else from PyPI
# ARGS=...                passed on to the demo, the bench or pytest
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

ifdef PYTHON
PY := $(PYTHON)
BIN := $(abspath $(dir $(shell command -v $(PYTHON))))
else
PY := $(VENV)/bin/python
BIN := $(CURDIR)/$(VENV)/bin
BASE := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)
endif
export PATH := $(BIN):$(PATH)
# The checkout's package goes before an installed one.
export PYTHONPATH := $(CURDIR)/python
READY := $(VENV)/.ready-$(shell echo '$(TORCH)' | cksum | cut -d ' ' -f 1)
CXX_FILES = $(shell find bench csrc include tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CMAKE_HERE = -DPython_EXECUTABLE="$$($(PY) -c 'import sys; print(sys.executable)')" --log-level=NOTICE
ifdef CUDA
export KVKERNELS_CUDA := $(CUDA)
endif

.PHONY: help demo test bench lint format wheel audit asan simt cuda gpu-check headers nvcc build test-build clean distclean env

help:
	@echo 'make demo    pack a real KV cache with every format: bytes, error, time per step against torch; a model writes from it'
	@echo 'make test    C++ header tests, pytest once per instruction set, wheel, README'
	@echo 'make bench   kernels against the limits of this machine and their peers (ARGS=--help)'
	@echo 'make lint    clang-format, ruff, mypy        make format   rewrites what lint would complain of'
	@echo 'make wheel   dist/*.whl                      make audit    what the wheel needs from a machine'
	@echo 'make asan    tests under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make simt    the CUDA kernels on this CPU: no GPU, no toolkit needed'
	@echo 'make cuda    compiles the CUDA kernels for two architectures (ARCHS=80-real: one); registers and spills against the budget'
	@echo 'make gpu-check  on a machine with a GPU: tests, sanitizer, bench'
	@echo 'make clean   removes what was built          make distclean  and .venv'

# ---- environment: a stamp per set of packages, so that pip runs only when a list has changed
ifdef PYTHON
env:
	@$(PY) tools/env.py check
env-%: env
	@$(PY) tools/env.py check $*
else
env env-test env-bench: $(READY)
	@:
env-%: $(READY)-%
	@:
$(READY): pyproject.toml tools/env.py
	@test -n "$(BASE)" || { echo 'kvkernels: needs Python >= 3.10 with venv; none found on PATH (or: make PYTHON=/path/to/python)'; exit 1; }
	@$(BASE) tools/env.py create $(VENV) --torch '$(TORCH)' test bench
	@touch $@
$(READY)-%: $(READY)
	@$(BASE) tools/env.py create $(VENV) --torch '$(TORCH)' $*
	@touch $@
.PRECIOUS: $(READY)-%
endif

# What is not on the machine comes from PyPI.
headers: env
	@$(PY) tools/cuda_toolkit.py headers >/dev/null 2>&1 || $(MAKE) env-headers
nvcc: env
	@$(PY) tools/cuda_toolkit.py nvcc >/dev/null 2>&1 || $(MAKE) env-nvcc

build: env $(if $(filter on,$(CUDA)),nvcc)
	@$(PY) setup.py -q build_ext --inplace

# ---- what people want
demo: env-bench env-model build
	@$(PY) -m bench.demo $(ARGS)
	@$(PY) -m bench.generate --context 4096 --threads 2 --seconds 5

bench: env-bench build
	@$(PY) -m bench $(ARGS)

test-build: env-test
	@CMAKE_ARGS="-DKVKERNELS_TESTS=ON" $(PY) setup.py -q build_ext --inplace

# What this machine can run, best first.
ISAS := $(PY) -c "import json, torch, kvkernels; print(*json.loads(torch.ops.kvkernels.build_info())['isas'][::-1])"
CTEST := ctest --output-on-failure --no-tests=error -j 2 --test-dir
WORKERS := -n 2 --dist worksteal

test: test-build
	@isas=$$($(ISAS)) && only="$(WORKERS)" && \
	echo "== C++ tests: $$isas" && \
	$(CTEST) build/release -R "_($$(echo $$isas | tr ' ' '|'))$$" && \
	for isa in $$isas; do \
	  echo "== pytest, KVKERNELS_ISA=$$isa $$only" && \
	  KVKERNELS_ISA=$$isa PYTEST_ADDOPTS="$$only" $(PY) -m pytest -q $(ARGS) || exit 1; \
	  only="$(WORKERS) -m 'not once'"; \
	done

wheel: build
	@rm -f dist/*.whl
	@$(PY) -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w dist .
	@ls -l dist/*.whl

audit: wheel env-audit
	@$(PY) tools/audit_wheel.py dist/*.whl

# The preloads: the library's sanitizer must be the first thing in the process, and it looks for libstdc++ at once.
# Without avx512, which is avx512vnni less one instruction.
asan: env-test build
	@cmake --preset asan -DPython_EXECUTABLE="$$($(PY) -c 'import sys; print(sys.executable)')" -DKVKERNELS_TESTS=ON --log-level=NOTICE
	@cmake --build --preset asan
	@lib() { realpath "$$($(CXX) -print-file-name=$$1)"; } && isas=$$($(ISAS) | sed 's/ avx512 / /') && \
	echo "== C++ tests: $$isas" && \
	$(CTEST) build/asan -R "_($$(echo $$isas | tr ' ' '|'))$$" && \
	files=tests && for isa in $$isas; do \
	  echo "== pytest $$files, sanitized, KVKERNELS_ISA=$$isa" && \
	  LD_PRELOAD="$$(lib libasan.so) $$(lib libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  KVKERNELS_ISA=$$isa KVKERNELS_LIBRARY=$(CURDIR)/build/asan/libkvkernels.so $(PY) -m pytest -q $(WORKERS) -m 'not once' $$files $(ARGS) || exit 1; \
	  files=tests/test_contract.py; \
	done

# The CUDA kernels in the emulator, each test with its own random order of threads. check: every access of every thread is
# seen, and a copy that is read too soon or overwritten too soon is reported whenever it lands (tests/simt shows that).
# fast: the results of optimised kernels, a copy landing as late as it may; all kernels that copy so are in test_contract.
SIMT_TESTS = $(addprefix tests/test_,contract.py formats.py properties.py sparse.py delta.py errors.py)
simt: env-test env-simt headers
	@cmake --preset simt $(CMAKE_HERE)
	@cmake --build --preset simt
	@run() { echo "== pytest, CUDA kernels, $$1, copies land $$2" && \
	  library=$(CURDIR)/build/simt/kvkernels_simt_$$1.so copies=$$2 && shift 2 && \
	  KVKERNELS_LIBRARY=$$library KVKERNELS_SIMT=$$copies $(PY) -m pytest -q $(WORKERS) -m 'not once' "$$@" $(ARGS); } && \
	run check random -m once tests/simt && \
	run fast late tests/test_contract.py && \
	run check random $(SIMT_TESTS)

BUDGET = bench/results/ptxas.md
cuda: env-test nvcc
	@eval "$$($(PY) tools/cuda_toolkit.py environment)" && \
	cmake --preset cuda $(CMAKE_HERE) $(if $(ARCHS),-DCMAKE_CUDA_ARCHITECTURES='$(ARCHS)') && cmake --build --preset cuda
	@$(PY) tools/ptxas_table.py build/cuda $(or $(ARGS),--check) $(BUDGET)
	@KVKERNELS_LIBRARY=$(CURDIR)/build/cuda/libkvkernels.so KVKERNELS_BUILD_DIR=$(CURDIR)/build/cuda \
	$(PY) -m pytest -q tests/test_layers.py tests/test_errors.py -k "not symbols_of_an_isa"

gpu-check:
	@$(PY) tools/gpu_check.py $(ARGS)

lint: env-lint
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@clang-format --dry-run -Werror $(CXX_FILES)
	@$(PY) -m mypy

format: env-lint
	@$(PY) -m ruff check --fix-only -q .
	@$(PY) -m ruff format .
	@clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist python/*.egg-info python/kvkernels/libkvkernels.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf $(VENV)
