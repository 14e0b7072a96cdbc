// Memory that device code may touch: arrays of the caller's, and shared memory of blocks.
#ifndef NABLA_FAST_CUDA_HOST_MEMORY_H_
#define NABLA_FAST_CUDA_HOST_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "host/shadow.h"

namespace nabla_fast::host {

// What an array is: shared memory begins without content, constant memory stays as it is.
enum class Kind { kGlobal, kConstant, kShared };

// An array and its shadow.
struct Region {
  std::string name;
  char* begin;
  size_t bytes;
  Kind kind;
  Shadow shadow;

  Region(std::string name, char* begin, size_t bytes, Kind kind)
      : name(std::move(name)), begin(begin), bytes(bytes), kind(kind), shadow(bytes) {}
};

// The caller's arrays.
class GlobalMemory {
 public:
  // Device code may touch [memory, memory + bytes) from now on.
  void add(const void* memory, size_t bytes, const std::string& name, Kind kind);
  void clear();
  bool empty() const { return regions_.empty(); }
  // The last array that begins at an address or before it, or null.
  Region* before(const char* address);

 private:
  std::map<const char*, Region> regions_;  // by their first byte
};

// The shared memory of a block: variables side by side with gaps between them that nobody may touch,
// each poisoned with NaN in every floating-point format.
class SharedMemory {
 public:
  // Most shared memory of a block on any device.
  static constexpr size_t kMostBytes = 232448;

  SharedMemory();

  // Forgets all variables.
  void clear();
  // The variable that is known by `key`, made when it is asked for first.
  char* variable(const void* key, size_t bytes, const std::string& name);
  // The bytes of all variables, those included that no longer have room.
  size_t bytes() const { return bytes_; }

  bool owns(const char* address) const {
    return address >= memory_[0].bytes && address < memory_[0].bytes + room();
  }
  // The last variable that begins at an address or before it, or null.
  Region* before(const char* address);
  // The same byte of another block's shared memory.
  char* of(SharedMemory& other, const char* address);

 private:
  size_t room() const { return memory_.size() * sizeof(Aligned); }

  struct Aligned {
    alignas(128) char bytes[128];
  };
  std::vector<Aligned> memory_;
  size_t used_ = 0, bytes_ = 0;
  std::vector<const void*> keys_;
  std::vector<Region> regions_;
};

}  // namespace nabla_fast::host

#endif  // NABLA_FAST_CUDA_HOST_MEMORY_H_
