#include "host/memory.h"

#include <algorithm>
#include <cstring>

namespace nabla_fast::host {

void GlobalMemory::add(const void* memory, size_t bytes, const std::string& name, Kind kind) {
  auto* const begin = static_cast<char*>(const_cast<void*>(memory));
  regions_.erase(begin);
  if (bytes > 0) regions_.emplace(begin, Region(name, begin, bytes, kind));
}

void GlobalMemory::clear() { regions_.clear(); }

Region* GlobalMemory::before(const char* address) {
  const auto after = regions_.upper_bound(address);
  return after == regions_.begin() ? nullptr : &std::prev(after)->second;
}

namespace {

// All ones are NaN as float64, float32, bfloat16 and float16, and -1 as an integer.
constexpr int kPoison = 0xFF;
constexpr size_t kGap = 128;

}  // namespace

// Twice the most, for gaps and for what a launch asks for beyond its limit.
SharedMemory::SharedMemory() : memory_(2 * kMostBytes / sizeof(Aligned)) {}

void SharedMemory::clear() {
  used_ = bytes_ = 0;
  keys_.clear();
  regions_.clear();
}

char* SharedMemory::variable(const void* key, size_t bytes, const std::string& name) {
  const auto at = std::find(keys_.begin(), keys_.end(), key);
  if (at != keys_.end()) return regions_[static_cast<size_t>(at - keys_.begin())].begin;
  bytes_ += bytes;
  if (bytes > room() || used_ + bytes > room()) return nullptr;
  char* const begin = memory_[0].bytes + used_;
  used_ += (bytes + kGap + kGap - 1) / kGap * kGap;
  std::memset(begin, kPoison, bytes);
  keys_.push_back(key);
  regions_.emplace_back(name, begin, bytes, Kind::kShared);
  return begin;
}

Region* SharedMemory::before(const char* address) {
  Region* last = nullptr;
  for (Region& region : regions_)
    if (region.begin <= address) last = &region;
  return last;
}

char* SharedMemory::of(SharedMemory& other, const char* address) {
  return memory_[0].bytes + (address - other.memory_[0].bytes);
}

}  // namespace nabla_fast::host
