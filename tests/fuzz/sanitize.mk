# make -f tests/fuzz/sanitize.mk: the kernels behind the C interface under sanitizers.
#
# address   AddressSanitizer and UndefinedBehaviorSanitizer: the C example, and the fuzz driver on
#           kernels with OpenMP
# thread    ThreadSanitizer: the fuzz driver on several threads of its own, on kernels whose OpenMP
#           threads come from openmp_threads.cpp
#
# guard     neither: the fuzz driver on kernels as the package has them, with the CPU's own instructions,
#           whose memory lies between pages that nobody may touch
#
# In the first two every level of instructions runs on any CPU: the bf16 units and what this CPU lacks are those of
# tests/emulation/, in which a sanitizer sees what a tile reads and writes.
#
# SECONDS: how long a driver runs at most; SEED: where it begins.

SECONDS ?= 45
CASES ?= 1000000
SEED ?= 1
include tests/emulation/level.mk
BUILD := build/sanitize/$(EMULATED_FROM)

# All but csrc/cpu/internal/, which only the Python extension calls.
KERNELS := $(filter-out csrc/cpu/internal/%,$(sort $(wildcard csrc/cpu/*/*.cpp))) tests/emulation/units.cpp
DRIVER := $(filter-out tests/fuzz/openmp_threads.cpp,$(wildcard tests/fuzz/*.cpp))
EXAMPLE := examples/c/linked.c examples/c/descend.c

# As setup.py has them, but for less optimization and no -fwrapv.
FLAGS := -O1 -g1 -fopenmp -fno-omit-frame-pointer -Wall -Wextra -Wno-psabi -Icsrc/cpu -Icsrc/include
FLAGS += -fno-math-errno -fno-trapping-math -ffp-contract=fast
CXXFLAGS := -std=c++17 $(FLAGS) -DNABLA_FAST_EMULATED_FROM=$(EMULATED_FROM) -Itests
CFLAGS := -std=c99 -pedantic -Werror $(FLAGS)
ADDRESS := -fsanitize=address,undefined -fno-sanitize-recover=all
THREAD := -fsanitize=thread
# Optimized, loops over vectors take gcc fifteen times as long under AddressSanitizer.
$(BUILD)/address/csrc/%: ADDRESS += -O0
# One product of tiles is 8192 multiply-adds.
$(BUILD)/address/tests/emulation/%: ADDRESS += -O2
$(BUILD)/thread/tests/emulation/%: THREAD += -O2

.PHONY: all build address thread guard
all: address thread guard
build: $(BUILD)/address/fuzz $(BUILD)/address/example $(BUILD)/thread/fuzz $(BUILD)/guard/fuzz

objects = $(patsubst %,$(BUILD)/$(1)/%.o,$(2))

address: $(BUILD)/address/fuzz $(BUILD)/address/example
	$(BUILD)/address/example
	$(BUILD)/address/fuzz --seed $(SEED) --seconds $(SECONDS) --cases $(CASES)

# With its own threads the driver needs more: each kernel starts some too.
thread: $(BUILD)/thread/fuzz
	TSAN_OPTIONS=halt_on_error=1 $< --seed $(SEED) --seconds $(SECONDS) --cases $(CASES) --threads 3

$(BUILD)/address/fuzz: $(call objects,address,$(KERNELS) $(DRIVER))
	$(CXX) $(ADDRESS) -fopenmp $^ -o $@

$(BUILD)/address/example: $(call objects,address,$(KERNELS) $(EXAMPLE))
	$(CXX) $(ADDRESS) -fopenmp $^ -o $@

guard: $(BUILD)/guard/fuzz
	$< --seed $(SEED) --seconds $(SECONDS) --cases $(CASES)

$(BUILD)/guard/fuzz: $(call objects,guard,$(filter-out tests/emulation/%,$(KERNELS)) $(DRIVER))
	$(CXX) -fopenmp $^ -o $@

# Without libgomp.
$(BUILD)/thread/fuzz: $(call objects,thread,$(KERNELS) $(DRIVER) tests/fuzz/openmp_threads.cpp)
	$(CXX) $(THREAD) -pthread $^ -o $@

$(BUILD)/address/%.cpp.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) $(ADDRESS) -MMD -MP -c $< -o $@

$(BUILD)/address/%.c.o: %.c
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) $(ADDRESS) -MMD -MP -c $< -o $@

$(BUILD)/guard/csrc/%: OPTIMIZE := -O3 -fstrict-overflow
$(BUILD)/guard/%.cpp.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) -std=c++17 $(FLAGS) $(OPTIMIZE) -Itests -MMD -MP -c $< -o $@

$(BUILD)/thread/%.cpp.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) $(THREAD) -MMD -MP -c $< -o $@

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
