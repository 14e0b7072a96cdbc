# make -f csrc/cuda/library.mk: libnabla_fast_cuda.so, for programs. Needs nvcc 13; no GPU, no driver.
#
# TARGETS: compute capabilities, each with machine code of its own, which later minor versions run too.
# PTX: one whose PTX is there for all other devices from it on.

NVCC ?= nvcc
TARGETS ?= 80 90 100 120
PTX ?= 90
BUILD ?= build/cuda-library
LIBRARY ?= nabla_fast/libnabla_fast_cuda.so

SOURCES := $(sort $(wildcard csrc/cuda/*.cu)) csrc/cpu/base/overlap.cpp csrc/cpu/base/status.cpp
FLAGS := -std=c++17 -O3 -compress-mode=size $(foreach t,$(TARGETS),-gencode arch=compute_$(t),code=sm_$(t))
FLAGS += -gencode arch=compute_$(PTX),code=compute_$(PTX)
FLAGS += -Icsrc/cuda -Icsrc/cpu -Icsrc/include -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra

$(LIBRARY): $(SOURCES:%=$(BUILD)/%.o)
	$(NVCC) -shared -cudart static $^ -Xlinker --version-script=csrc/exports.map -Xlinker --no-undefined \
		-Xlinker -soname=$(@F) -Xlinker --gc-sections -o $@

$(BUILD)/%.o: % csrc/cuda/library.mk
	@mkdir -p $(@D)
	$(NVCC) $(FLAGS) -MD -MF $@.d -c $< -o $@

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
