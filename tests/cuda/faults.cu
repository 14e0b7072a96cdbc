// Kernels with faults that the host finds, and kernels like them without: `faults NAME [SEED [TARGET]]`
// runs one and prints whether it came to its end, its results, and what was reported; `faults` lists
// the names.
//
// "// <-" marks where a report says that the fault is, "// <=" what a race is with.

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "device.h"
#include "host/control.h"
#include "launch.h"

using namespace nabla_fast::cuda;

namespace {

constexpr int kThreads = 64, kBlocks = 4;

// The caller's memory; registered but for the last 4 of `padded`.
alignas(16) float data[kThreads * kBlocks];
alignas(16) float padded[20];
float constants[4];

bool run(void (*kernel)(float*), Launch how = {}) {
  how.kernel = "kernel";
  if (how.blocks == 0) how.blocks = 1;
  if (how.threads == 0) how.threads = kThreads;
  return launch(how, kernel, data);
}

Launch of_blocks(int64_t blocks) {
  Launch how = {};
  how.blocks = blocks;
  return how;
}
Launch of_cluster(unsigned blocks) {
  Launch how = of_blocks(kBlocks);
  how.cluster = blocks;
  return how;
}
Launch cooperative() {
  Launch how = of_blocks(kBlocks);
  how.cooperative = true;
  return how;
}
Launch with_shared(size_t bytes) {
  Launch how = of_blocks(1);
  how.shared = bytes;
  return how;
}

struct Row {
  float of[kThreads];
};

__device__ unsigned lane() { return threadIdx.x % kWarpThreads; }
__device__ unsigned neighbour() { return (threadIdx.x + 1) % kThreads; }
__device__ unsigned place() { return blockIdx.x * blockDim.x + threadIdx.x; }

// -- races ----------------------------------------------------------------------------------------

__global__ void read_after_write(float* out) {
  NABLA_FAST_SHARED(Row, row);
  row.of[threadIdx.x] = threadIdx.x;       // <=
  out[threadIdx.x] = row.of[neighbour()];  // <-
}
__global__ void read_after_write_sound(float* out) {
  NABLA_FAST_SHARED(Row, row);
  row.of[threadIdx.x] = threadIdx.x;
  sync_block();
  out[threadIdx.x] = row.of[neighbour()];
}

// Without poison or uninitialized memory in play: both orders give numbers.
__global__ void write_after_read(float* out) {
  NABLA_FAST_SHARED(Row, row);
  row.of[threadIdx.x] = threadIdx.x;
  sync_block();
  const float other = row.of[neighbour()];  // <=
  row.of[threadIdx.x] = -1;                 // <-
  out[threadIdx.x] = other;
}
__global__ void write_after_read_sound(float* out) {
  NABLA_FAST_SHARED(Row, row);
  row.of[threadIdx.x] = threadIdx.x;
  sync_block();
  const float other = row.of[neighbour()];
  sync_block();
  row.of[threadIdx.x] = -1;
  out[threadIdx.x] = other;
}

// A barrier of each warp orders the threads of one, not those of two.
__global__ void across_warps(float* out) {
  NABLA_FAST_SHARED(Row, row);
  row.of[threadIdx.x] = threadIdx.x;  // <=
  sync_warp();
  out[threadIdx.x] = row.of[kThreads - 1 - threadIdx.x];  // <-
}
__global__ void within_warps(float* out) {
  NABLA_FAST_SHARED(Row, row);
  row.of[threadIdx.x] = threadIdx.x;
  sync_warp();
  out[threadIdx.x] = row.of[threadIdx.x ^ 31];
}

// A shuffle brings lanes together and orders no memory.
__global__ void shuffle_is_no_barrier(float* out) {
  NABLA_FAST_SHARED(Row, row);
  row.of[threadIdx.x] = threadIdx.x;  // <=
  const float mine = shuffle_xor(1.0f, 1);
  out[threadIdx.x] = mine * row.of[threadIdx.x ^ 1];  // <-
}

__global__ void blocks_write_one_place(float* out) {
  out[threadIdx.x] = blockIdx.x;  // <- <=
}
__global__ void blocks_write_their_own(float* out) { out[place()] = blockIdx.x; }

// The writer has passed a barrier with one of the readers only: with that of its own block.
__global__ void block_overwrites_what_another_reads(float* out) {
  if (blockIdx.x > 1) return;
  const float first = out[0];  // <=
  sync_block();
  if (place() == 0) out[0] = 1;  // <-
  out[kThreads + place()] = first;
}

__global__ void peers_of_a_cluster(float* out) {
  NABLA_FAST_SHARED(Row, row);
  row.of[threadIdx.x] = blockIdx.x;  // <=
  sync_block();
  const Row* other = shared_of(&row, (blockIdx.x + 1) % 2);
  out[place()] = other->of[threadIdx.x];  // <-
  sync_cluster();
}
__global__ void peers_of_a_cluster_sound(float* out) {
  NABLA_FAST_SHARED(Row, row);
  row.of[threadIdx.x] = blockIdx.x;
  sync_cluster();
  const Row* other = shared_of(&row, (blockIdx.x + 1) % 2);
  out[place()] = other->of[threadIdx.x];
  sync_cluster();
}

__global__ void peer_that_has_ended(float* out) {
  NABLA_FAST_SHARED(Row, row);
  row.of[threadIdx.x] = blockIdx.x;
  sync_cluster();
  const Row* other = shared_of(&row, (blockIdx.x + 1) % 2);
  out[place()] = other->of[threadIdx.x];  // <-
}

__global__ void across_a_grid(float* out) {
  out[place()] = blockIdx.x;  // <=
  sync_block();
  const float other = out[(place() + kThreads) % (kThreads * kBlocks)];  // <-
  sync_grid();
  out[place()] = other;
}
__global__ void across_a_grid_sound(float* out) {
  out[place()] = blockIdx.x;
  sync_grid();
  const float other = out[(place() + kThreads) % (kThreads * kBlocks)];
  sync_grid();
  out[place()] = other;
}

// -- barriers -------------------------------------------------------------------------------------

__global__ void one_thread_ends(float* out) {
  if (threadIdx.x == 5) return;
  sync_block();  // <-
  out[threadIdx.x] = 1;
}

__global__ void one_lane_ends(float* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = shuffle_xor(1.0f, 1);  // <-
}

__global__ void block_ends_in_cluster(float*) {
  if (blockIdx.x == 1) return;
  sync_cluster();  // <-
}

__global__ void block_ends_in_grid(float*) {
  if (blockIdx.x == 1) return;
  sync_grid();  // <-
}

__global__ void warps_wait_apart(float*) {
  if (threadIdx.x < kWarpThreads)
    sync_block();  // <-
  else
    shuffle_xor(1.0f, threadIdx.x == kWarpThreads);
  if (threadIdx.x == kWarpThreads) return;
  if (threadIdx.x > kWarpThreads) sync_block();
}

// -- warps ----------------------------------------------------------------------------------------

__global__ void lane_outside_its_mask(float* out) {
  out[threadIdx.x] = ballot(1, true);  // <-
}

__global__ void masks_that_differ(float* out) {
  out[threadIdx.x] = ballot(lane() == 0 ? 3 : ~0u, true);  // <-
}

__global__ void odd_lanes_vote(float* out) {
  out[threadIdx.x] = lane() % 2 ? ballot(0xAAAAAAAA, lane() > 16) >> 16 : 0;
}

__global__ void part_of_a_warp_shuffles(float* out) {
  out[threadIdx.x] = shuffle_xor(1.0f, 1);  // <-
}

// -- memory ---------------------------------------------------------------------------------------

__global__ void load_at_an_odd_place(float* out) {
  const Four<float> four = load_four(out + 1);  // <-
  out[threadIdx.x] = four.of[0];
}

__global__ void element_at_an_odd_place(float* out) {
  const float* odd = reinterpret_cast<const float*>(reinterpret_cast<const char*>(out) + 2);
  out[threadIdx.x] = *odd;  // <-
}

__global__ void beyond_an_array(float* out) {
  out[threadIdx.x + 1] = 1;  // <-
}

__global__ void four_beyond_an_array(float* out) {
  const Four<float> four = load_four(out + 16);  // <-
  out[0] = four.of[0];
}

__global__ void constant_memory(float* out) {
  if (*out == 0) *out = 1;  // <-
}

__global__ void memory_of_nobody(float* out, const float* nobody) {
  out[0] = *nobody;  // <-
}

__global__ void beyond_a_shared_variable(float* out) {
  NABLA_FAST_SHARED(Row, row);
  float* at = row.of + (threadIdx.x == kThreads - 1);
  at[threadIdx.x] = 0;  // <-
  out[threadIdx.x] = at[threadIdx.x];
}

__global__ void shared_memory_without_content(float* out) {
  NABLA_FAST_SHARED(Row, row);
  if (threadIdx.x > 0) row.of[threadIdx.x] = 0;
  out[threadIdx.x] = row.of[threadIdx.x];  // <-
}

__global__ void dynamic_beyond_its_end(float* out) {
  auto* row = static_cast<float*>(dynamic_shared());
  row[threadIdx.x] = 1;  // <-
  out[threadIdx.x] = row[threadIdx.x];
}
__global__ void dynamic_sound(float* out) {
  auto* row = static_cast<float*>(dynamic_shared());
  row[threadIdx.x] = 1;
  sync_block();
  out[threadIdx.x] = row[neighbour()];
}

__global__ void dynamic_without_any(float* out) {
  out[0] = *static_cast<float*>(dynamic_shared());  // <-
}

__global__ void static_beside_dynamic(float* out) {
  NABLA_FAST_SHARED(Row, row);  // <-
  row.of[threadIdx.x] = 0;
  out[threadIdx.x] = row.of[threadIdx.x];
}

__global__ void peer_of_another_cluster(float* out) {
  NABLA_FAST_SHARED(Row, row);
  out[threadIdx.x] = shared_of(&row, 2)->of[0];  // <-
}

__global__ void nothing(float*) {}

// -- copies ---------------------------------------------------------------------------------------

struct alignas(16) CopiedRow {
  float of[kThreads];
};
constexpr uint32_t kRowBytes = sizeof(CopiedRow);

// A row comes by a bulk copy, is read, and comes again.
__global__ void copies_sound(float* out) {
  NABLA_FAST_SHARED(CopiedRow, row);
  NABLA_FAST_SHARED(CopyBarrier, copies);
  if (threadIdx.x == 0) init_copies(&copies);
  sync_block();
  for (unsigned n = 0; n < 3; ++n) {
    if (threadIdx.x == 0) {
      expect_copies(&copies, kRowBytes);
      bulk_copy(row.of, out, kRowBytes / 2, &copies);
      bulk_copy(row.of + kThreads / 2, out + kThreads / 2, kRowBytes / 2, &copies);
    }
    wait_for_copies(&copies, n % 2);
    const float copied = row.of[neighbour()] + 1;
    sync_block();
    out[kThreads + threadIdx.x] = copied;
  }
}
__global__ void read_before_its_copy(float* out) {
  NABLA_FAST_SHARED(CopiedRow, row);
  NABLA_FAST_SHARED(CopyBarrier, copies);
  if (threadIdx.x == 0) init_copies(&copies);
  if (threadIdx.x == 0) expect_copies(&copies, kRowBytes);
  if (threadIdx.x == 0) bulk_copy(row.of, out, kRowBytes, &copies);  // <=
  if (threadIdx.x == 0) wait_for_copies(&copies, 0);
  sync_block();
  out[kThreads + threadIdx.x] = row.of[neighbour()];  // <-
}
__global__ void copy_over_what_is_read(float* out) {
  NABLA_FAST_SHARED(CopiedRow, row);
  NABLA_FAST_SHARED(CopyBarrier, copies);
  if (threadIdx.x == 0) init_copies(&copies);
  row.of[threadIdx.x] = 0;
  sync_block();
  out[kThreads + threadIdx.x] = row.of[neighbour()];  // <=
  if (threadIdx.x == 0) {
    expect_copies(&copies, kRowBytes);
    bulk_copy(row.of, out, kRowBytes, &copies);  // <-
  }
  wait_for_copies(&copies, 0);
}
__global__ void copies_that_do_not_come(float* out) {
  NABLA_FAST_SHARED(CopiedRow, row);
  NABLA_FAST_SHARED(CopyBarrier, copies);
  if (threadIdx.x == 0) init_copies(&copies);
  if (threadIdx.x == 0) expect_copies(&copies, kRowBytes);
  if (threadIdx.x == 0) bulk_copy(row.of, out, kRowBytes / 2, &copies);
  sync_block();
  wait_for_copies(&copies, 0);  // <-
}
__global__ void copy_that_nobody_waits_for(float* out) {
  NABLA_FAST_SHARED(CopiedRow, row);
  NABLA_FAST_SHARED(CopyBarrier, copies);
  if (threadIdx.x > 0) return;
  init_copies(&copies);
  expect_copies(&copies, kRowBytes);
  bulk_copy(row.of, out, kRowBytes, &copies);
}
__global__ void copy_of_an_odd_place(float* out) {
  NABLA_FAST_SHARED(CopiedRow, row);
  NABLA_FAST_SHARED(CopyBarrier, copies);
  if (threadIdx.x > 0) return;
  init_copies(&copies);
  bulk_copy(row.of, out + 1, kRowBytes, &copies);  // <-
}
__global__ void copy_barrier_that_is_not_made(float*) {
  NABLA_FAST_SHARED(CopyBarrier, copies);
  expect_copies(&copies, kRowBytes);  // <-
}

// A thread's own copies, in two groups.
__global__ void own_copies_sound(float* out) {
  NABLA_FAST_SHARED(CopiedRow, row);
  if (threadIdx.x % 8 != 0) return;
  for (unsigned n = threadIdx.x; n < threadIdx.x + 8; n += 4) {
    copy_16(row.of + n, out + n);
    end_copy_group();
  }
  wait_for_copy_groups<1>();
  out[kThreads + threadIdx.x] = row.of[threadIdx.x];
  wait_for_copy_groups<0>();
  out[kThreads + threadIdx.x + 4] = row.of[threadIdx.x + 4];
}
__global__ void own_copies_too_early(float* out) {
  NABLA_FAST_SHARED(CopiedRow, row);
  if (threadIdx.x % 4 != 0) return;
  copy_16(row.of + threadIdx.x, out + threadIdx.x);  // <=
  end_copy_group();
  wait_for_copy_groups<1>();
  out[kThreads + threadIdx.x] = row.of[threadIdx.x];  // <-
}

// -- what the address sanitizer sees --------------------------------------------------------------

__global__ void beyond_a_local_array(float* out) {
  volatile float few[8] = {};
  const volatile int at = 12;
  out[threadIdx.x] = few[at];
}
__global__ void heap_behind_its_end(float* out) {
  if (threadIdx.x > 0) return;
  auto* few = static_cast<volatile float*>(std::malloc(8 * sizeof(float)));
  const volatile int at = 12;
  out[0] = few[at];
}

struct Fault {
  const char* name;
  bool (*run)();
};

const Fault kFaults[] = {
    {"read_after_write", [] { return run(read_after_write); }},
    {"read_after_write_sound", [] { return run(read_after_write_sound); }},
    {"write_after_read", [] { return run(write_after_read); }},
    {"write_after_read_sound", [] { return run(write_after_read_sound); }},
    {"across_warps", [] { return run(across_warps); }},
    {"within_warps", [] { return run(within_warps); }},
    {"shuffle_is_no_barrier", [] { return run(shuffle_is_no_barrier); }},
    {"blocks_write_one_place", [] { return run(blocks_write_one_place, of_blocks(kBlocks)); }},
    {"blocks_write_their_own", [] { return run(blocks_write_their_own, of_blocks(kBlocks)); }},
    {"block_overwrites_what_another_reads",
     [] { return run(block_overwrites_what_another_reads, of_blocks(kBlocks)); }},
    {"peers_of_a_cluster", [] { return run(peers_of_a_cluster, of_cluster(2)); }},
    {"peers_of_a_cluster_sound", [] { return run(peers_of_a_cluster_sound, of_cluster(2)); }},
    {"peer_that_has_ended", [] { return run(peer_that_has_ended, of_cluster(2)); }},
    {"across_a_grid", [] { return run(across_a_grid, cooperative()); }},
    {"across_a_grid_sound", [] { return run(across_a_grid_sound, cooperative()); }},
    {"one_thread_ends", [] { return run(one_thread_ends); }},
    {"one_lane_ends", [] { return run(one_lane_ends); }},
    {"block_ends_in_cluster", [] { return run(block_ends_in_cluster, of_cluster(2)); }},
    {"grid_that_is_not_cooperative", [] { return run(across_a_grid_sound, of_blocks(kBlocks)); }},
    {"block_ends_in_grid", [] { return run(block_ends_in_grid, cooperative()); }},
    {"warps_wait_apart", [] { return run(warps_wait_apart); }},
    {"lane_outside_its_mask", [] { return run(lane_outside_its_mask); }},
    {"masks_that_differ", [] { return run(masks_that_differ); }},
    {"odd_lanes_vote", [] { return run(odd_lanes_vote); }},
    {"part_of_a_warp_shuffles",
     [] {
       Launch how = of_blocks(1);
       how.threads = 40;
       return run(part_of_a_warp_shuffles, how);
     }},
    {"load_at_an_odd_place", [] { return run(load_at_an_odd_place); }},
    {"element_at_an_odd_place", [] { return run(element_at_an_odd_place); }},
    {"beyond_an_array", [] { return launch({"kernel", nullptr, 1, 16}, beyond_an_array, padded); }},
    {"four_beyond_an_array",
     [] { return launch({"kernel", nullptr, 1, 1}, four_beyond_an_array, padded); }},
    {"constant_memory",
     [] { return launch({"kernel", nullptr, 1, 1}, constant_memory, constants); }},
    {"memory_of_nobody",
     [] {
       const float nobody = 0;
       return launch({"kernel", nullptr, 1, 1}, memory_of_nobody, padded, &nobody);
     }},
    {"beyond_a_shared_variable", [] { return run(beyond_a_shared_variable); }},
    {"shared_memory_without_content", [] { return run(shared_memory_without_content); }},
    {"dynamic_beyond_its_end", [] { return run(dynamic_beyond_its_end, with_shared(4 * 63)); }},
    {"dynamic_sound", [] { return run(dynamic_sound, with_shared(4 * kThreads)); }},
    {"dynamic_without_any", [] { return run(dynamic_without_any); }},
    {"static_beside_dynamic", [] { return run(static_beside_dynamic, with_shared(232448 - 255)); }},
    {"static_beside_dynamic_sound",
     [] { return run(static_beside_dynamic, with_shared(232448 - 256)); }},
    {"peer_of_another_cluster", [] { return run(peer_of_another_cluster, of_cluster(2)); }},
    {"copies_sound", [] { return run(copies_sound); }},
    {"read_before_its_copy", [] { return run(read_before_its_copy); }},
    {"copy_over_what_is_read", [] { return run(copy_over_what_is_read); }},
    {"copies_that_do_not_come", [] { return run(copies_that_do_not_come); }},
    {"copy_that_nobody_waits_for", [] { return run(copy_that_nobody_waits_for); }},
    {"copy_of_an_odd_place", [] { return run(copy_of_an_odd_place); }},
    {"copy_barrier_that_is_not_made", [] { return run(copy_barrier_that_is_not_made); }},
    {"own_copies_sound", [] { return run(own_copies_sound); }},
    {"own_copies_too_early", [] { return run(own_copies_too_early); }},
    {"too_much_dynamic", [] { return run(nothing, with_shared(101376 + 1)); }},
    {"cluster_of_17",
     [] {
       Launch how = of_blocks(17);
       how.cluster = 17;
       return run(nothing, how);
     }},
    {"cluster_that_does_not_divide", [] { return run(nothing, of_cluster(3)); }},
    {"cluster_of_2", [] { return run(nothing, of_cluster(2)); }},
    {"too_many_threads",
     [] {
       Launch how = of_blocks(1);
       how.threads = 1025;
       return run(nothing, how);
     }},
    {"too_many_together",
     [] {
       Launch how = of_blocks(kBlocks << 10);
       how.cooperative = true;
       return run(nothing, how);
     }},
    {"beyond_a_local_array", [] { return run(beyond_a_local_array); }},
    {"heap_behind_its_end", [] { return run(heap_behind_its_end); }},
};

}  // namespace

int main(int count, char** words) {
  if (count == 1) {
    for (const Fault& fault : kFaults) std::puts(fault.name);
    return 0;
  }
  const uint64_t seed = count > 2 ? std::strtoull(words[2], nullptr, 10) : 0;
  if (!nabla_fast_host_configure(seed, count > 3 ? std::atoi(words[3]) : 90)) return 3;
  nabla_fast_host_register(data, sizeof data, "data", false);
  nabla_fast_host_register(padded, 16 * sizeof(float), "padded", false);
  nabla_fast_host_register(constants, sizeof constants, "constants", true);
  for (const Fault& fault : kFaults) {
    if (std::strcmp(fault.name, words[1]) != 0) continue;
    std::puts(fault.run() ? "done" : "stopped");
    for (const float x : data) std::printf("%g ", x);
    std::printf("\n%s", nabla_fast_host_reports());
    return 0;
  }
  return 2;
}
