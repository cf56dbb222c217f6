// The operations of one path, first in, first out, with those on one block in order.
//
// Threads: every member may be called from any thread.
// Invariants: an operation starts only when no conflicting one on its block runs (reads share a block, a
//             write has it alone); one that must wait holds back all later ones, so order needs no more.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <optional>
#include <vector>

#include "storage/block_operation.h"

namespace offload {

class OperationQueue {
 public:
  // After close() the operations fail with kState instead.
  void push(std::vector<BlockOperation> operations);

  // The next operation, which has started. No value: none may start now.
  std::optional<BlockOperation> try_start();

  // Waits for one. No value: the queue was closed.
  std::optional<BlockOperation> start();

  // The operation no longer uses its block.
  void end(const BlockOperation& operation);

  // Operations that have not started fail with kState.
  void close();

 private:
  bool head_may_start() const;  // needs mutex_
  BlockOperation start_head();  // needs mutex_

  std::mutex mutex_;
  std::condition_variable changed_;
  // guarded by mutex_
  std::deque<BlockOperation> waiting_;
  bool is_closed_ = false;
};

}  // namespace offload
