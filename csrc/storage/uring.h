// An io_uring: two rings shared with the kernel, one of submissions and one of completions.
//
// Ownership: owns the descriptor and the mappings. The memory of what was submitted is the caller's.
// Threads: one thread uses it. Destroy it only when nothing is in flight: the kernel would go on with memory
//          that the caller takes for free.
// Units: bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "storage/system_calls.h"
#include "storage/uring_abi.h"

namespace offload {

// Why a Uring cannot be had here; empty when it can.
std::string uring_refusal(std::shared_ptr<SystemCalls> calls);

class Uring {
 public:
  // Throws kStorage, with the reason, when the kernel gives none or is older than 5.6.
  Uring(std::shared_ptr<SystemCalls> calls, unsigned entry_count);
  ~Uring();
  Uring(const Uring&) = delete;
  Uring& operator=(const Uring&) = delete;

  // Puts an entry into the ring for the next enter(). The caller keeps at most `entry_count` in all in
  // flight.
  void prepare(UringOperation operation, int file, void* address, uint32_t bytes, uint64_t offset,
               uint64_t user_data) noexcept;

  // Submits what was prepared, and waits for a completion unless there is one. Returns 0 or a negative errno;
  // what the kernel has then not taken stays prepared.
  int enter() noexcept;

  // Takes back the newest entry that the kernel has not taken: its user_data. No value: it has taken all.
  std::optional<uint64_t> take_back() noexcept;

  // The oldest completion, if there is one.
  std::optional<UringCompletion> complete() noexcept;

 private:
  void map(const UringParameters& parameters);
  void unmap() noexcept;

  const std::shared_ptr<SystemCalls> calls_;
  int ring_ = -1;
  void* rings_ = nullptr;
  size_t rings_bytes_ = 0;
  void* entries_map_ = nullptr;
  size_t entries_bytes_ = 0;

  // in the shared memory; the kernel moves a head where we move the tail, and the reverse
  uint32_t* submission_head_ = nullptr;
  uint32_t* submission_tail_ = nullptr;
  uint32_t* submission_array_ = nullptr;
  uint32_t submission_mask_ = 0;
  UringEntry* entries_ = nullptr;
  uint32_t* completion_head_ = nullptr;
  uint32_t* completion_tail_ = nullptr;
  uint32_t completion_mask_ = 0;
  UringCompletion* completions_ = nullptr;
};

}  // namespace offload
