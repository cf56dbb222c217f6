// What a CUDA device tells of the memory that it shares with the host, and the kind that follows from it.
//
// Ownership: values; reading them needs the driver, no context.
// Threads: any.
// Invariants: an attribute that an older driver does not know reads as "no".
#pragma once

#include "device/cuda_driver.h"

namespace offload {

enum class CudaMemoryKind {
  kDiscrete,    // the device reads host memory that is registered with it
  kHmm,         // it also reads any other host memory, by migrating pages
  kAts,         // it shares the host's page tables over a coherent link (Grace Hopper)
  kIntegrated,  // there is one memory
};

struct CudaMemoryFacts {
  CudaMemoryKind kind = CudaMemoryKind::kDiscrete;
  bool integrated = false;
  bool managed_memory = false;
  bool concurrent_managed_access = false;  // host and device may use managed memory at the same time
  bool pageable_memory_access = false;     // the device reads memory of malloc
  bool uses_host_page_tables = false;      // ... through the host's page tables
  bool direct_access_from_host = false;    // the host reads managed memory on the device where it is
  bool host_native_atomics = false;        // atomics work across the link
  bool reads_page_locked_memory = false;   // the device reaches registered memory at the host's addresses
  int host_numa_node = -1;                 // the host memory next to the device; -1: the driver does not say
};

const char* memory_kind_name(CudaMemoryKind kind);

// The device of an index as torch counts. Throws kDevice when there is none.
CudaOrdinal find_cuda_device(const CudaDriver& driver, int index);

int device_attribute(const CudaDriver& driver, CudaOrdinal ordinal, int attribute);

CudaMemoryFacts read_memory_facts(const CudaDriver& driver, CudaOrdinal ordinal);

}  // namespace offload
