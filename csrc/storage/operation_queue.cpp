#include "storage/operation_queue.h"

#include <iterator>
#include <utility>

#include "base/error.h"

namespace offload {
namespace {

template <typename Operations>
void fail_all(const Operations& operations) {
  for (const BlockOperation& operation : operations) {
    operation.request->end_one(std::make_exception_ptr(
        Error(ErrorKind::kState, "the block file was closed before this read or write began")));
  }
}

}  // namespace

void OperationQueue::push(std::vector<BlockOperation> operations) {
  {
    std::lock_guard lock(mutex_);
    if (!is_closed_) {
      waiting_.insert(waiting_.end(), std::make_move_iterator(operations.begin()),
                      std::make_move_iterator(operations.end()));
      operations.clear();
    }
  }
  fail_all(operations);
  changed_.notify_all();
}

std::optional<BlockOperation> OperationQueue::try_start() {
  std::lock_guard lock(mutex_);
  if (!head_may_start()) return std::nullopt;
  return start_head();
}

std::optional<BlockOperation> OperationQueue::start() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return is_closed_ || head_may_start(); });
  if (is_closed_) return std::nullopt;
  return start_head();
}

void OperationQueue::end(const BlockOperation& operation) {
  {
    std::lock_guard lock(mutex_);
    if (operation.is_write) {
      operation.record->is_written_to = false;
    } else {
      --operation.record->reader_count;
    }
  }
  changed_.notify_all();
}

void OperationQueue::close() {
  std::deque<BlockOperation> dropped;
  {
    std::lock_guard lock(mutex_);
    is_closed_ = true;
    dropped.swap(waiting_);
  }
  changed_.notify_all();
  fail_all(dropped);
}

bool OperationQueue::head_may_start() const {
  if (waiting_.empty()) return false;
  const BlockOperation& head = waiting_.front();
  return !head.record->is_written_to && !(head.is_write && head.record->reader_count > 0);
}

BlockOperation OperationQueue::start_head() {
  BlockOperation operation = std::move(waiting_.front());
  waiting_.pop_front();
  if (operation.is_write) {
    operation.record->is_written_to = true;
  } else {
    ++operation.record->reader_count;
  }
  return operation;
}

}  // namespace offload
