// Fibers: functions with stacks of their own that run in turns on one thread of the system.
#ifndef NABLA_FAST_CUDA_HOST_FIBER_H_
#define NABLA_FAST_CUDA_HOST_FIBER_H_

#include <cstddef>
#include <cstdint>

// The switch of stacks is written for x86-64; elsewhere, or on demand, it is the system's.
#if !defined(__x86_64__) || defined(NABLA_FAST_HOST_UCONTEXT)
  #define NABLA_FAST_HOST_USES_UCONTEXT 1
  #include <ucontext.h>
#else
  #define NABLA_FAST_HOST_USES_UCONTEXT 0
#endif

namespace nabla_fast::host {

// A function that has been started, or can be. Its memory is kept when it ends: start() begins anew.
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes resume() begin with run(argument). What ran before, if it has not ended, is forgotten.
  void start(void (*run)(void*), void* argument);
  // Runs the fiber, from outside of all fibers, until it suspends itself or ends.
  void resume();
  // Returns to resume(); from within this fiber.
  void suspend();

  bool ended() const { return ended_; }
  bool owns(const void* address) const {
    const auto* byte = static_cast<const char*>(address);
    return byte >= memory_ && byte < memory_ + bytes_;
  }

 private:
#if NABLA_FAST_HOST_USES_UCONTEXT
  using Context = ucontext_t;
#else
  using Context = void*;  // the stack pointer; the rest lies on the stack
#endif

  static void enter();
  void switch_from(Context& from, Context& to);

  char* memory_;
  size_t bytes_;
  Context inside_{}, outside_{};
  void (*run_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool ended_ = true;
  // What AddressSanitizer asks for: the stack that resume() was called on, and what it keeps of
  // either stack while the other runs.
  const void* outer_stack_ = nullptr;
  size_t outer_bytes_ = 0;
  void *kept_inside_ = nullptr, *kept_outside_ = nullptr;
};

}  // namespace nabla_fast::host

#endif  // NABLA_FAST_CUDA_HOST_FIBER_H_
