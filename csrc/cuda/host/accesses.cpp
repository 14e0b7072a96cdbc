// Accesses of device code to memory, as its compiler announces them.
//
// Device code is compiled with -fsanitize=thread and not linked with that sanitizer: its compiler
// puts a call of one of these functions before every access to memory that another thread could
// see. So kernels are checked as they stand. An access to an element of N bytes stops at an address
// that is no multiple of N, as a device does.

#include <cstddef>

#include "host/grid.h"

using nabla_fast::host::access;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define NABLA_FAST_ACCESSES(bytes)                                     \
  void __tsan_read##bytes(void* address) {                             \
    access(address, bytes, false, true, __builtin_return_address(0));  \
  }                                                                    \
  void __tsan_write##bytes(void* address) {                            \
    access(address, bytes, true, true, __builtin_return_address(0));   \
  }                                                                    \
  void __tsan_unaligned_read##bytes(void* address) {                   \
    access(address, bytes, false, false, __builtin_return_address(0)); \
  }                                                                    \
  void __tsan_unaligned_write##bytes(void* address) {                  \
    access(address, bytes, true, false, __builtin_return_address(0));  \
  }

NABLA_FAST_ACCESSES(1)
NABLA_FAST_ACCESSES(2)
NABLA_FAST_ACCESSES(4)
NABLA_FAST_ACCESSES(8)
NABLA_FAST_ACCESSES(16)

void __tsan_read_range(void* address, size_t bytes) {
  access(address, bytes, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  access(address, bytes, true, false, __builtin_return_address(0));
}
}
