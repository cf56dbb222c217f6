// What moves the blocks of one path, by one of two back-ends.
//
// Ownership: a lane owns its threads; it shares nothing with other lanes. File and records outlive it.
// Threads: submit() and stats() may be called from any thread. Destruction waits for what the disk has
//          begun; what has not begun fails with kState.
// Invariants: operations on one block take effect in the order of submission. A read ends well only with the
//             bytes of the last write: everything else is kStorage, and a block whose write failed says so
//             until a later write of it succeeds.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "storage/block_operation.h"
#include "storage/operation_queue.h"
#include "storage/scratch_file.h"
#include "storage/system_calls.h"

namespace offload {

struct LaneStats {
  uint64_t read_bytes = 0;  // that ended well
  uint64_t written_bytes = 0;
  uint64_t failed_count = 0;  // reads and writes that did not
};

class DiskLane {
 public:
  DiskLane(std::shared_ptr<SystemCalls> calls, const ScratchFile& file)
      : calls_(std::move(calls)), file_(file) {}
  virtual ~DiskLane() = default;

  void submit(std::vector<BlockOperation> operations) { queue_.push(std::move(operations)); }
  LaneStats stats() const noexcept;

 protected:
  enum class Progress { kEnded, kMore };

  // Before the first transfer: the checksum of a write. kEnded: a read of a lost block, which has failed.
  Progress begin(BlockOperation& operation) noexcept;

  // After a transfer that returned a count of bytes or a negative errno. kMore: transfer what is left.
  Progress advance(BlockOperation& operation, int64_t result) noexcept;

  // Ends the operation that could not be transferred.
  void fail(BlockOperation& operation, int code, const std::string& doing) noexcept;

  const std::shared_ptr<SystemCalls> calls_;
  const ScratchFile& file_;
  OperationQueue queue_;

 private:
  std::string description(const BlockOperation& operation) const;
  void end(BlockOperation& operation, std::exception_ptr error) noexcept;

  std::atomic<uint64_t> read_bytes_{0};
  std::atomic<uint64_t> written_bytes_{0};
  std::atomic<uint64_t> failed_count_{0};
};

// `thread_count` threads, each with one pread or pwrite at a time.
std::unique_ptr<DiskLane> make_thread_lane(std::shared_ptr<SystemCalls> calls, const ScratchFile& file,
                                           size_t thread_count);

// One thread that keeps `depth` operations in an io_uring. Throws kStorage when the kernel has none to give.
std::unique_ptr<DiskLane> make_uring_lane(std::shared_ptr<SystemCalls> calls, const ScratchFile& file,
                                          size_t depth);

}  // namespace offload
