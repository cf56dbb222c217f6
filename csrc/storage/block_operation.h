// One block on its way to or from the disk, and what is remembered of each block.
//
// Ownership: records live in the BlockFile, which outlives its lanes; requests are shared by the operations
//            that they were split into. Memory is the caller's until the ticket ended.
// Threads: the fields of a record are guarded by the mutex of its lane's OperationQueue, but for those that
//          an operation in progress has to itself, and submitted_bytes.
// Units: bytes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>

#include "base/clock.h"
#include "base/ticket.h"
#include "base/trace_ring.h"

namespace offload {

struct BlockRecord {
  // guarded by the BlockFile's mutex: how many bytes the block holds once everything submitted has run; 0:
  // it was never written
  uint32_t submitted_bytes = 0;

  // an operation in progress has these to itself, or shares them with other readers
  uint32_t checksum = 0;
  bool is_lost = false;  // the last write failed: what the disk has is not known

  // guarded by the queue's mutex
  bool is_written_to = false;
  uint32_t reader_count = 0;
};

// What a caller waits for: its operations, on however many lanes.
class DiskRequest {
 public:
  DiskRequest(size_t operation_count, bool is_write, uint64_t bytes)
      : left_(operation_count), is_write_(is_write), bytes_(bytes) {}

  const Ticket& ticket() const noexcept { return ticket_; }

  // One of the operations begins: the first of them is where the request begins in a trace.
  void begin_one() noexcept {
    int64_t unset = 0;
    if (trace_is_on())
      begin_ns_.compare_exchange_strong(unset, monotonic_now_ns(), std::memory_order_relaxed);
  }

  // The last operation to end ends the ticket, with the first error.
  void end_one(std::exception_ptr error) noexcept {
    if (error) {
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::move(error);
    }
    if (left_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    // Before the ticket: who waited for the request finds its record.
    if (const int64_t begin_ns = begin_ns_.load(std::memory_order_relaxed); begin_ns != 0 && trace_is_on()) {
      const auto lane = is_write_ ? TraceLane::kDiskWrite : TraceLane::kDiskRead;
      record_trace(lane, begin_ns, monotonic_now_ns(), bytes_, label_);
    }
    ticket_.fail(error_);
  }

 private:
  const Ticket ticket_ = Ticket::pending();
  std::atomic<size_t> left_;
  const bool is_write_;
  const uint64_t bytes_;
  const TraceLabel label_ = trace_label();  // of the submitter
  std::atomic<int64_t> begin_ns_{0};
  std::mutex mutex_;
  std::exception_ptr error_;  // guarded by mutex_ until the last operation ended
};

struct BlockOperation {
  bool is_write = false;
  char* address = nullptr;
  uint32_t bytes = 0;           // what the caller asked for, and the checksum covers
  uint32_t transfer_bytes = 0;  // the same, rounded up to kDiskAlignment
  uint32_t done_bytes = 0;      // of transfer_bytes
  uint64_t file_offset = 0;
  bool was_refused_space = false;
  BlockRecord* record = nullptr;
  std::shared_ptr<DiskRequest> request;
};

}  // namespace offload
