// The part of the io_uring interface of Linux that is used here, so that old kernel headers build it too.
//
// Invariants: the kernel's binary interface, which never changes: layouts and numbers hold on every 64-bit
//             architecture. Operations kRead and kWrite came with Linux 5.6, as the feature bit below.
// Units: bytes; offsets are into the mapped rings.
#pragma once

#include <cstdint>

namespace offload {

constexpr long kUringSetupNumber = 425;
constexpr long kUringEnterNumber = 426;
constexpr unsigned kUringEnterGetEvents = 1;

constexpr uint64_t kUringRingsOffset = 0;  // of mmap: both rings, when the kernel has the feature
constexpr uint64_t kUringEntriesOffset = 0x10000000;
constexpr uint32_t kUringFeatureSingleMap = 1u << 0;
constexpr uint32_t kUringFeatureRwCurrentPosition = 1u << 3;  // since 5.6

enum class UringOperation : uint8_t { kRead = 22, kWrite = 23 };

struct UringEntry {  // a submission
  uint8_t operation;
  uint8_t flags;
  uint16_t priority;
  int32_t file;
  uint64_t offset;
  uint64_t address;
  uint32_t bytes;
  uint32_t operation_flags;
  uint64_t user_data;
  uint64_t unused[3];
};
static_assert(sizeof(UringEntry) == 64);

struct UringCompletion {
  uint64_t user_data;
  int32_t result;
  uint32_t flags;
};
static_assert(sizeof(UringCompletion) == 16);

struct UringSubmissionOffsets {
  uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved;
  uint64_t user_address;
};

struct UringCompletionOffsets {
  uint32_t head, tail, ring_mask, ring_entries, overflow, completions, flags, reserved;
  uint64_t user_address;
};

struct UringParameters {
  uint32_t submission_entries, completion_entries, flags, thread_cpu, thread_idle, features, workqueue;
  uint32_t reserved[3];
  UringSubmissionOffsets submission;
  UringCompletionOffsets completion;
};
static_assert(sizeof(UringParameters) == 120);

}  // namespace offload
