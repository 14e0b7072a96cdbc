#include "host/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
  #include <sanitizer/common_interface_defs.h>
#endif

#if !NABLA_FAST_HOST_USES_UCONTEXT
// Keeps the registers that a called function must preserve on the stack, the stack pointer in *from,
// and goes on where the stack `to` was left. Rounding modes are nobody's to change here.
extern "C" void nabla_fast_host_switch_stack(void** from, void* to);
asm(R"(
  .text
  .hidden nabla_fast_host_switch_stack
  .globl nabla_fast_host_switch_stack
  .type nabla_fast_host_switch_stack, @function
nabla_fast_host_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size nabla_fast_host_switch_stack, . - nabla_fast_host_switch_stack
)");
#endif

namespace nabla_fast::host {
namespace {

// Frames of sanitized code are several times as large.
constexpr size_t kStackBytes = size_t{1} << 18;

// The fiber that resume() has just been called for.
Fiber* entered = nullptr;

void before_switch(void** kept, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(kept, stack, bytes);
#else
  (void)kept, (void)stack, (void)bytes;
#endif
}

void after_switch(void* kept, const void** from_stack, size_t* from_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(kept, from_stack, from_bytes);
#else
  (void)kept, (void)from_stack, (void)from_bytes;
#endif
}

}  // namespace

Fiber::Fiber() : bytes_(kStackBytes) {
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  // A page that nobody may touch ends a stack that has grown too long.
  if (memory == MAP_FAILED || mprotect(memory, sysconf(_SC_PAGESIZE), PROT_NONE) != 0) {
    std::perror("nabla_fast host: no memory for a fiber's stack");
    std::abort();
  }
  memory_ = static_cast<char*>(memory);
}

Fiber::~Fiber() { munmap(memory_, bytes_); }

void Fiber::start(void (*run)(void*), void* argument) {
  run_ = run;
  argument_ = argument;
  ended_ = false;
  kept_inside_ = nullptr;
#if NABLA_FAST_HOST_USES_UCONTEXT
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = memory_;
  inside_.uc_stack.ss_size = bytes_;
  inside_.uc_link = nullptr;
  makecontext(&inside_, &Fiber::enter, 0);
#else
  // As if a switch had been called just before enter(): six registers, and where to return to, which
  // is in place of a call: the stack pointer is then 8 below a multiple of 16.
  auto** top = reinterpret_cast<void**>(memory_ + bytes_) - 1;
  *--top = reinterpret_cast<void*>(&Fiber::enter);
  for (int n = 0; n < 6; ++n) *--top = nullptr;
  inside_ = top;
#endif
}

void Fiber::enter() {
  Fiber* const self = entered;
  after_switch(nullptr, &self->outer_stack_, &self->outer_bytes_);
  self->run_(self->argument_);
  self->ended_ = true;
  // A stack that nobody returns to keeps nothing.
  before_switch(nullptr, self->outer_stack_, self->outer_bytes_);
  self->switch_from(self->inside_, self->outside_);
}

void Fiber::switch_from(Context& from, Context& to) {
#if NABLA_FAST_HOST_USES_UCONTEXT
  swapcontext(&from, &to);
#else
  nabla_fast_host_switch_stack(&from, to);
#endif
}

void Fiber::resume() {
  entered = this;
  before_switch(&kept_outside_, memory_, bytes_);
  switch_from(outside_, inside_);
  after_switch(kept_outside_, nullptr, nullptr);
}

void Fiber::suspend() {
  before_switch(&kept_inside_, outer_stack_, outer_bytes_);
  switch_from(inside_, outside_);
  after_switch(kept_inside_, &outer_stack_, &outer_bytes_);
}

}  // namespace nabla_fast::host
