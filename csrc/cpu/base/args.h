// Structs of arguments, which grow at their end from version to version.
//
// A function works on a copy that is as long as it knows the struct: what a shorter one of an older
// caller does not have is 0, and what a longer one of a newer caller has must be 0.
#ifndef NABLA_FAST_CPU_BASE_ARGS_H_
#define NABLA_FAST_CPU_BASE_ARGS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/check.h"
#include "nabla_fast.h"

namespace nabla_fast {

// Size of the first version of a struct: where one has grown, the offset of the first field that the
// first version did not have.
template <typename Args>
constexpr int64_t kFirstVersionBytes = sizeof(Args);
template <>
inline constexpr int64_t kFirstVersionBytes<nabla_fast_mix_args> =
    offsetof(nabla_fast_mix_args, perturbed);

// More bytes than a struct of any version has.
constexpr int64_t kMaxArgsBytes = 4096;

// OK with the caller's struct in `to`, or why it is refused.
template <typename Args>
nabla_fast_status read_args(const Args* from, Args& to) {
  constexpr int64_t kKnown = sizeof(Args);
  if (!from) return NABLA_FAST_INVALID_POINTER;
  const int64_t size = from->size;
  if (size < kFirstVersionBytes<Args> || size > kMaxArgsBytes) return NABLA_FAST_INVALID_SIZE;
  to = {};
  std::memcpy(&to, from, static_cast<size_t>(std::min(size, kKnown)));
  const char* const bytes = reinterpret_cast<const char*>(from);
  if (size > kKnown && std::any_of(bytes + kKnown, bytes + size, [](char c) { return c != 0; }))
    return NABLA_FAST_INVALID_SIZE;
  return NABLA_FAST_OK;
}

// Result of a size query, given what its function is given: `check` says why the function refuses
// what it reads, `bytes` is how much memory it needs.
template <typename Args, typename Check, typename Bytes>
int64_t workspace_bytes(const Args* args, const Check& check, const Bytes& bytes) {
  Args call;
  if (read_args(args, call) != NABLA_FAST_OK || check(call) != NABLA_FAST_OK) return 0;
  return Size(bytes(call)).or_zero();
}

// OK if the workspace of a call has `bytes`, which are 0 if they are too many.
template <typename Args>
nabla_fast_status check_workspace(const Args& call, int64_t bytes) {
  if (bytes == 0) return NABLA_FAST_TOO_LARGE;
  if (!call.workspace) return NABLA_FAST_INVALID_POINTER;
  return call.workspace_bytes < bytes ? NABLA_FAST_WORKSPACE_TOO_SMALL : NABLA_FAST_OK;
}

}  // namespace nabla_fast

#endif  // NABLA_FAST_CPU_BASE_ARGS_H_
