// The functions that torch.cuda.memory.CUDAPluggableAllocator takes: managed memory for a torch.cuda.MemPool.
//
// Ownership: a block belongs to torch from alloc to free; what torch never frees goes with the process. The
//            functions live as long as the process, for torch keeps their addresses and calls them at its
//            end.
// Threads: any.
// Invariants: neither function throws. Null means no memory: torch frees what it caches, tries once more and
//             raises its own OutOfMemoryError; last_refusal() has the reason.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <string>

#include "unified/unified_memory.h"

namespace offload {

// From now on the functions serve the device. `host_bytes` as of UnifiedMemory::allocate, until the next
// call.
void open_torch_allocator(int index, const std::string& driver_path, size_t host_bytes);

std::string last_refusal(int index);  // of open devices; "" when nothing was refused since it was opened

}  // namespace offload

extern "C" {

__attribute__((visibility("default"))) void* offload_unified_alloc(ssize_t bytes, int device,
                                                                   void* stream) noexcept;
__attribute__((visibility("default"))) void offload_unified_free(void* address, ssize_t bytes, int device,
                                                                 void* stream) noexcept;
}
