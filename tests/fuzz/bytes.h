// Memory of a call's tensors, beside which every access is noticed.
//
// AddressSanitizer sees the ends of what is allocated, but not what instructions in assembly read and
// write. Without it, the memory ends hard at a page that nobody may touch, or begins behind one.
#ifndef NABLA_FAST_FUZZ_BYTES_H_
#define NABLA_FAST_FUZZ_BYTES_H_

#include <cstddef>
#include <cstdlib>
#include <vector>

#include "fuzz.h"

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  #define NABLA_FAST_FUZZ_GUARDED
  #include <sys/mman.h>
  #include <unistd.h>
#endif

namespace fuzz {

#ifdef NABLA_FAST_FUZZ_GUARDED
class Bytes {
 public:
  Bytes(Random& random, size_t size) : size_(size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inner = (size + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    base_ =
        static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    check(base_ != MAP_FAILED, "no memory");
    check(!inner || !mprotect(base_ + page, inner, PROT_READ | PROT_WRITE), "no guard pages");
    data_ = base_ + page + (random.one_in(3) ? 0 : inner - size);
  }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  ~Bytes() { munmap(base_, mapped_); }

  char* data() { return data_; }

 private:
  size_t size_, mapped_;
  char *base_, *data_;

 public:
#else
class Bytes {
 public:
  Bytes(Random&, size_t size) : size_(size), bytes_(size) { bytes_.shrink_to_fit(); }
  char* data() { return bytes_.data(); }

 private:
  size_t size_;
  std::vector<char> bytes_;

 public:
#endif
  size_t size() const { return size_; }
  char* begin() { return data(); }
  char* end() { return data() + size_; }
};

}  // namespace fuzz

#endif  // NABLA_FAST_FUZZ_BYTES_H_
