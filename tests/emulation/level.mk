# EMULATED_FROM: the first level of instructions that a build for tests has in software, the first that
# this CPU lacks if nothing is said. The bf16 units are always in software.
has = $(filter-out 0,$(shell $(CXX) -march=native -dM -E -x c++ /dev/null 2>/dev/null | grep -cE '__($(1))__ 1'))
EMULATED_FROM ?= $(if $(filter 5,$(call has,AVX2|FMA|F16C|BMI|BMI2)),$(if $(filter 5,$(call has,AVX512F|AVX512BW|AVX512CD|AVX512DQ|AVX512VL)),3,2),1)
