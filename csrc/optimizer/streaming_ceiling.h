// The least that a pass over the optimizer's memory can cost: reads and writes, next to no arithmetic.
//
// Ownership: borrows the arrays for the call.
// Threads: cuts the arrays into blocks for a WorkerPool, as update_states_parallel does.
// Units: elements of 1, 2 or 4 bytes.
// Invariants: kRead and kUpdate arrays keep their bytes; kWrite arrays are filled with zeros.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace offload {

class WorkerPool;

enum class Access : uint8_t { kRead = 0, kUpdate = 1, kWrite = 2 };

struct StreamedArray {
  void* address;
  size_t element_bytes;
  Access access;
};

// How a pass moves memory. Which is fastest depends on the machine: the ceiling is the best of all.
struct StreamingMode {
  bool non_temporal;  // stores go around the caches (x86-64; elsewhere a plain store)
  bool prefetch;      // software prefetch, as the update's body has it
};

// One pass over `count` elements of every array, together. Addresses must be multiples of 64 bytes.
void streaming_pass(WorkerPool& pool, const std::vector<StreamedArray>& arrays, size_t count,
                    StreamingMode mode);

}  // namespace offload
