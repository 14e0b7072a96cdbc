# Every target sets up .venv by itself; only python3, a C++ compiler and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

CSRC := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
C_TESTS := $(shell find tests examples -name '*.cpp' -o -name '*.cu' -o -name '*.c' -o -name '*.h')

# One thread for numpy's BLAS beside torch's own. Threads that spin while they wait make every parallel
# loop milliseconds slower on cores that are shared with other programs.
export OPENBLAS_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-slow test-newest test-oldest emulate lint bench compile-check families cuda format gpu \
	gpu-wheels sanitize odr clean

demo: $(INSTALLED)
	$(BIN)/nabla-fast demo

# Tests run in WORKERS processes of one thread each. With a compiler at hand a missing extension is a
# failure, not a reason to skip its tests.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

test: $(INSTALLED)
	$(if $(shell command -v $(firstword $(CXX)) 2>/dev/null),NABLA_FAST_REQUIRE_NATIVE=1) $(PYTEST)

# The same tests with other releases, in an environment of their own for each Python. Newest: whatever
# pip finds, but for torch, of which a newer release may be a CUDA build of 3 GB (TORCH=torch takes it).
# Oldest: what pyproject.toml admits at least; its torch is a CUDA build where no index has another.
RELEASE := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
TORCH ?= $(shell grep '^torch==' constraints.txt)
newest_releases = --upgrade --upgrade-strategy eager '$(TORCH)'
oldest_releases = -c constraints-oldest.txt

test-newest test-oldest: test-%: .venv-%-$(RELEASE)/.installed
	OMP_NUM_THREADS=1 $(<D)/bin/pytest -n $(WORKERS)

.venv-%-$(RELEASE)/.installed: pyproject.toml setup.py constraints.txt constraints-oldest.txt $(CSRC)
	$(PYTHON) -m venv --clear $(@D)
	$(call announce_torch,$($*_releases))
	$(@D)/bin/python -m pip install --quiet $($*_releases) -e '.[dev]'
	touch $@

# Hundreds of random decodes through both loops, kernels at large sizes in Triton's interpreter.
test-slow: $(INSTALLED)
	$(PYTEST) -m slow

# Tests of the C++ kernels at every level of instructions, whatever this CPU has: bf16 units, and the
# levels that it lacks, are in software. Nothing is skipped for want of a level.
EMULATE := $(MAKE) -f tests/emulation/emulate.mk PYTHON=$(BIN)/python
EMULATED_TESTS := tests/ops/*/test_cpu.py tests/native/test_native.py tests/native/test_emulation.py \
	tests/models/test_llama_forward.py
emulate: $(INSTALLED)
	$(EMULATE) -j$(shell nproc) build
	NABLA_FAST_TEST_EXTENSION=$$($(EMULATE) -s path) $(PYTEST) $(EMULATED_TESTS)

# One definition of each name in all C++ files, as the linker finds with link-time optimization.
odr:
	$(MAKE) -f tests/emulation/emulate.mk odr

bench: $(INSTALLED)
	$(BIN)/nabla-fast bench kernels

# The kernels behind the C interface under AddressSanitizer, UndefinedBehaviorSanitizer and
# ThreadSanitizer, and without them between guard pages: random calls, hostile ones too. Only a C++
# compiler is needed.
sanitize:
	$(MAKE) -f tests/fuzz/sanitize.mk -j$(shell nproc) build
	$(MAKE) -f tests/fuzz/sanitize.mk

# The library of the CUDA kernels, for programs; nvcc 13 takes three minutes on two cores, a GPU is not needed.
cuda:
	$(MAKE) -f csrc/cuda/library.mk -j$(shell nproc)

# Every Triton kernel for GPUs that are not there; a spill, too much shared memory or more instructions
# than are committed fail. Where there is nvcc, the CUDA kernels for sm_90a too: a spill fails. After a change of kernels: COMPILE_ARGS=--write. All that is compiled for, kept
# under benchmarks/results: COMPILE_ARGS="--targets sm_80 sm_90 sm_100 sm_120 gfx942
# --triton pin 3.6.0 newest --store".
compile-check: $(INSTALLED)
	$(BIN)/python -m tools.compile_check --targets sm_90 gfx942 $(COMPILE_ARGS)
	$(if $(shell command -v nvcc 2>/dev/null),$(PYTEST) -m slow tests/cuda/test_nvcc.py -k sm_90a)

# A full decode of every causal LM type of the installed transformers, each in a process of its own:
# docs/models.md. Broken off, it goes on where it was; a quarter of an hour from nothing.
families: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.families $(FAMILIES_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC) $(C_TESTS)

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CSRC) $(C_TESTS)

# For a machine with a GPU, its own torch and no network: nothing is downloaded, no .venv is used.
gpu:
	$(PYTHON) -m tools.gpu_run $(GPU_ARGS)

# Other projects' kernels to measure beside ours, to be carried to that machine: pure Python, 2 MB.
gpu-wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --dest build/wheels \
		liger-kernel cut-cross-entropy

# The stamp is written last: after a broken-off installation the next call starts again, and anew
# where even pip is missing. The pinned torch is a CPU build where a package index offers one; elsewhere
# it is said before the download.
define announce_torch
@[ "$$(uname -sm)" != "Linux x86_64" ] || $(@D)/bin/python -m pip install --quiet --dry-run --no-deps \
	--ignore-installed --report - $(1) torch 2>/dev/null | grep '"url"' | grep -q cpu || echo "make: torch \
	comes as a CUDA build of about 3 GB; for the CPU build, of 200 MB, stop here and see docs/installing.md"
endef

$(INSTALLED): pyproject.toml setup.py constraints.txt $(CSRC)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(call announce_torch,-c constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find nabla_fast triton_kernels benchmarks tools tests -name __pycache__ -prune -exec rm -rf {} +
	rm -f nabla_fast/*.so $(INSTALLED)
