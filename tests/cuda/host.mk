# make -f tests/cuda/host.mk: device code of csrc/cuda compiled for the CPU that runs it in tests.
#
# faults            kernels with faults that the host finds
# faults-ucontext   the same with the system's switch of stacks
# faults-sanitized  the same under AddressSanitizer and UndefinedBehaviorSanitizer, in place of the
#                   host's own watch over memory
# calls-sanitized   calls of the kernels under the same sanitizers
# kernels.so        the functions of nabla_fast_cuda.h, and those of csrc/cuda/host/control.h
# kernels-small.so  the same with two rows at a time and chunks of one slice, or two for a single row, so
#                   that small problems have several of all
# kernels-products.so  the same as kernels.so with products by cublas_lt.cpp, which stands for cuBLASLt

BUILD ?= build/cuda

HOST := $(sort $(wildcard csrc/cuda/host/*.cpp))
KERNELS := $(sort $(wildcard csrc/cuda/*.cu))
SMALL := -DNABLA_FAST_CUDA_CHUNK_BYTES=32768 -DNABLA_FAST_CUDA_MOST_ROWS=2

FLAGS := -std=c++17 -O2 -g1 -fPIC -fvisibility=hidden -Wall -Wextra -MMD -MP
FLAGS += -Icsrc/cuda -Icsrc/cpu -Icsrc/include
# Sums are contracted where the source says so. Device code announces its accesses to memory; the
# functions that it calls for that are the host's, not the sanitizer's.
DEVICE_FLAGS := $(FLAGS) -ffp-contract=off -fsanitize=thread
# Names by which cublas_lt.cu looks for the vendor's library: none, or ours.
NO_PRODUCTS := '-DNABLA_FAST_CUDA_CUBLAS_LT=nullptr'
PRODUCTS := '-DNABLA_FAST_CUDA_CUBLAS_LT="$(abspath $(BUILD))/libcublas_lt.so"'
# Nothing of it runs on a device.
$(BUILD)/csrc/cuda/cublas_lt.cu.o $(BUILD)/small/csrc/cuda/cublas_lt.cu.o: DEVICE_FLAGS := $(FLAGS)
SANITIZED := $(FLAGS) -O1 -ffp-contract=off -fno-omit-frame-pointer -fsanitize=address,undefined \
	-fsanitize=float-cast-overflow -fno-sanitize-recover=all

.PHONY: all
all: $(addprefix $(BUILD)/,faults faults-ucontext faults-sanitized calls-sanitized kernels.so kernels-small.so kernels-products.so)

$(BUILD)/faults: $(HOST:%=$(BUILD)/%.o) $(BUILD)/tests/cuda/faults.cu.o
	$(CXX) $^ -ldl -o $@

$(BUILD)/faults-ucontext: $(HOST:%=$(BUILD)/ucontext/%.o) $(BUILD)/tests/cuda/faults.cu.o
	$(CXX) $^ -ldl -o $@

$(BUILD)/faults-sanitized: $(HOST:%=$(BUILD)/sanitized/%.o) $(BUILD)/sanitized/tests/cuda/faults.cu.o
	$(CXX) -fsanitize=address,undefined $^ -ldl -o $@

$(BUILD)/calls-sanitized: $(addprefix $(BUILD)/sanitized/,$(addsuffix .o,$(HOST) $(KERNELS) \
		csrc/cpu/base/overlap.cpp tests/cuda/calls.cpp))
	$(CXX) -fsanitize=address,undefined $^ -ldl -o $@

OWN_PRODUCTS := $(filter-out csrc/cuda/cublas_lt.cu,$(KERNELS))
LIBRARY := $(HOST:%=$(BUILD)/%.o) $(BUILD)/csrc/cpu/base/overlap.cpp.o $(BUILD)/csrc/cpu/base/status.cpp.o

$(BUILD)/kernels.so: $(KERNELS:%=$(BUILD)/%.o) $(LIBRARY)
	$(CXX) -shared -Wl,--no-undefined $^ -ldl -o $@

$(BUILD)/kernels-small.so: $(KERNELS:%=$(BUILD)/small/%.o) $(LIBRARY)
	$(CXX) -shared -Wl,--no-undefined $^ -ldl -o $@

$(BUILD)/kernels-products.so: $(OWN_PRODUCTS:%=$(BUILD)/%.o) $(BUILD)/products/cublas_lt.cu.o $(LIBRARY) \
		| $(BUILD)/libcublas_lt.so
	$(CXX) -shared -Wl,--no-undefined $^ -ldl -o $@

$(BUILD)/libcublas_lt.so: $(BUILD)/tests/cuda/cublas_lt.cpp.o
	$(CXX) -shared -Wl,--no-undefined $^ -o $@

$(BUILD)/products/cublas_lt.cu.o: csrc/cuda/cublas_lt.cu tests/cuda/host.mk
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $(PRODUCTS) -x c++ -c $< -o $@

$(BUILD)/%.cpp.o: %.cpp tests/cuda/host.mk
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) -c $< -o $@

$(BUILD)/%.cu.o: %.cu tests/cuda/host.mk
	@mkdir -p $(@D)
	$(CXX) $(DEVICE_FLAGS) $(NO_PRODUCTS) -x c++ -c $< -o $@

$(BUILD)/small/%.cu.o: %.cu tests/cuda/host.mk
	@mkdir -p $(@D)
	$(CXX) $(DEVICE_FLAGS) $(NO_PRODUCTS) $(SMALL) -x c++ -c $< -o $@

$(BUILD)/ucontext/%.cpp.o: %.cpp tests/cuda/host.mk
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) -DNABLA_FAST_HOST_UCONTEXT -c $< -o $@

$(BUILD)/sanitized/%.o: % tests/cuda/host.mk
	@mkdir -p $(@D)
	$(CXX) $(SANITIZED) $(NO_PRODUCTS) -x c++ -c $< -o $@

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
