# make -f tests/emulation/emulate.mk: the Python extension for every level of instructions, on any CPU.
#
# It computes with instructions of this CPU up to a level and with tests/emulation/ from there on.
# EMULATED_FROM: the first level in software, 1 (AVX2) to 3 (bf16 units); a lower one than the CPU needs
# shows what another CPU would have.

PYTHON ?= python3
OPTIMIZE ?= -O2
PYBIND11 ?= $(shell $(PYTHON) -c 'import pybind11; print(pybind11.get_include())')
PYTHON_INCLUDE ?= $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')
include tests/emulation/level.mk
BUILD ?= build/emulate/$(EMULATED_FROM)

KERNELS := $(sort $(wildcard csrc/cpu/*/*.cpp)) tests/emulation/units.cpp
SOURCES := $(sort $(wildcard csrc/python/*.cpp)) $(KERNELS)

# As setup.py has them, but for less optimization.
CXXFLAGS := -std=c++17 $(OPTIMIZE) -g1 -fPIC -fvisibility=hidden -fopenmp -Wall -Wextra -Wno-psabi -MMD -MP
CXXFLAGS += -fno-math-errno -fno-trapping-math -fstrict-overflow -ffp-contract=fast
CXXFLAGS += -DNABLA_FAST_EMULATED_FROM=$(EMULATED_FROM) -Icsrc/cpu -Icsrc/include -Itests

.PHONY: build path odr
build: $(BUILD)/_C.so
path:
	@echo $(abspath $(BUILD)/_C.so)

$(BUILD)/_C.so: $(SOURCES:%=$(BUILD)/%.o)
	$(CXX) -shared -fopenmp $^ -o $@

$(BUILD)/%.cpp.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -c $< -o $@

$(BUILD)/csrc/python/%.o: CXXFLAGS += -I$(PYBIND11) -I$(PYTHON_INCLUDE)

# One definition of each name in all files, as the package is built and as tests are: what one file
# would make of a name and another otherwise shows when all are linked together.
ODR := $(filter-out -MMD -MP -DNABLA_FAST_EMULATED_FROM=%,$(CXXFLAGS)) -O1 -flto=auto -Wodr -Werror=odr -shared
odr:
	$(CXX) $(ODR) $(filter csrc/%,$(KERNELS)) -o /dev/null
	$(CXX) $(ODR) -DNABLA_FAST_EMULATED_FROM=$(EMULATED_FROM) $(KERNELS) -o /dev/null

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
