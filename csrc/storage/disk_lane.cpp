#include "storage/disk_lane.h"

#include <cerrno>
#include <utility>

#include "storage/checksum.h"
#include "storage/storage_error.h"

namespace offload {

DiskLane::Progress DiskLane::begin(BlockOperation& operation) noexcept {
  BlockRecord& record = *operation.record;
  operation.request->begin_one();
  if (operation.is_write) {
    // Lost until the write has ended well: what the disk has in between is neither the old block nor the new.
    record.is_lost = true;
    record.checksum = block_checksum(operation.address, operation.bytes);
    return Progress::kMore;
  }
  if (!record.is_lost) return Progress::kMore;
  end(operation, std::make_exception_ptr(Error(
                     ErrorKind::kStorage,
                     description(operation) + " failed: the last write of that block had failed, and its "
                                              "bytes are lost. Go on from the last checkpoint.",
                     EIO)));
  return Progress::kEnded;
}

DiskLane::Progress DiskLane::advance(BlockOperation& operation, int64_t result) noexcept {
  if (result == -EINTR) return Progress::kMore;
  const bool is_full = result == -ENOSPC || result == -EDQUOT;
  if (is_full && operation.is_write && !operation.was_refused_space && file_.unshare()) {
    operation.was_refused_space = true;  // without a clone it writes to space that the file has
    return Progress::kMore;
  }
  if (result < 0) {
    fail(operation, static_cast<int>(-result), description(operation));
    return Progress::kEnded;
  }
  if (operation.done_bytes + static_cast<uint64_t>(result) >= operation.transfer_bytes) {
    end(operation, nullptr);
    return Progress::kEnded;
  }
  // The rest begins at an aligned place, as O_DIRECT demands.
  const auto aligned = static_cast<uint32_t>(result) / kDiskAlignment * kDiskAlignment;
  if (aligned == 0 && file_.given_up()) {
    end(operation, std::make_exception_ptr(
                       Error(ErrorKind::kStorage,
                             description(operation) +
                                 " failed: the disk was full, so the clone gave its space to the writes of "
                                 "the training. Free space on that file system, and save again.",
                             ENOSPC)));
    return Progress::kEnded;
  }
  if (aligned == 0) {
    end(operation,
        std::make_exception_ptr(Error(
            ErrorKind::kStorage,
            description(operation) + " failed: it moved " + std::to_string(operation.done_bytes + result) +
                " of " + std::to_string(operation.transfer_bytes) +
                " bytes. The file was truncated, or the drive is failing: see the kernel's log (dmesg) "
                "and go on from the last checkpoint.",
            EIO)));
    return Progress::kEnded;
  }
  operation.done_bytes += static_cast<uint32_t>(aligned);
  return Progress::kMore;
}

void DiskLane::fail(BlockOperation& operation, int code, const std::string& doing) noexcept {
  end(operation, std::make_exception_ptr(storage_error(code, doing)));
}

std::string DiskLane::description(const BlockOperation& operation) const {
  return std::string(operation.is_write ? "writing " : "reading ") + std::to_string(operation.bytes) +
         " bytes at offset " + std::to_string(operation.file_offset) + " of " + file_.path();
}

void DiskLane::end(BlockOperation& operation, std::exception_ptr error) noexcept {
  BlockRecord& record = *operation.record;
  if (!error && operation.is_write) {
    record.is_lost = false;
  } else if (!error && block_checksum(operation.address, operation.bytes) != record.checksum) {
    error = std::make_exception_ptr(
        Error(ErrorKind::kStorage,
              description(operation) +
                  " failed: the checksum differs, the disk gave other bytes than were written. "
                  "Check the drive and the memory, and go on from the last checkpoint."));
  }
  if (error) {
    failed_count_.fetch_add(1, std::memory_order_relaxed);
  } else {
    (operation.is_write ? written_bytes_ : read_bytes_).fetch_add(operation.bytes, std::memory_order_relaxed);
  }
  // The block before the ticket: who waited for the ticket finds the block free.
  queue_.end(operation);
  operation.request->end_one(std::move(error));
}

LaneStats DiskLane::stats() const noexcept {
  return {.read_bytes = read_bytes_.load(std::memory_order_relaxed),
          .written_bytes = written_bytes_.load(std::memory_order_relaxed),
          .failed_count = failed_count_.load(std::memory_order_relaxed)};
}

}  // namespace offload
