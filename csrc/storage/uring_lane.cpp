#include <cerrno>
#include <chrono>
#include <thread>
#include <utility>

#include "base/thread.h"
#include "storage/disk_lane.h"
#include "storage/uring.h"

namespace offload {
namespace {

// How long to leave the ring alone when the kernel refuses to wait for it: what is in flight ends anyway.
constexpr std::chrono::milliseconds kPauseAfterRefusal{1};
// "The application should wait for some completions and try again" (io_uring_enter(2), of EAGAIN): as often,
// one after the other, before the kernel's shortage is an error. A second or more.
constexpr int kMostRefusals = 1000;

class UringLane final : public DiskLane {
 public:
  UringLane(std::shared_ptr<SystemCalls> calls, const ScratchFile& file, size_t depth)
      : DiskLane(calls, file), ring_(std::move(calls), static_cast<unsigned>(depth)), slots_(depth) {
    for (size_t slot = 0; slot < depth; ++slot) free_slots_.push_back(slot);
    owner_ = start_thread("offload-disk", [this](std::stop_token) { run(); });
  }

  ~UringLane() override {
    queue_.close();
    owner_.join();
  }

 private:
  // An operation that comes while the owner waits for a completion starts with that completion: at most one
  // block's time later, and while the ring is idle at once.
  void run() {
    for (;;) {
      while (!free_slots_.empty()) {
        const bool is_idle = free_slots_.size() == slots_.size();
        std::optional<BlockOperation> operation = is_idle ? queue_.start() : queue_.try_start();
        if (!operation && is_idle) return;
        if (!operation) break;
        if (begin(*operation) == Progress::kMore) put(std::move(*operation));
      }
      submit_and_wait();
      // One at a time: the drive gets its next operation before the next checksum is computed.
      if (std::optional<UringCompletion> completion = ring_.complete()) end_transfer(*completion);
    }
  }

  void put(BlockOperation operation) {
    const size_t slot = free_slots_.back();
    free_slots_.pop_back();
    slots_[slot] = std::move(operation);
    prepare(slot);
  }

  void prepare(size_t slot) {
    const BlockOperation& operation = slots_[slot];
    ring_.prepare(operation.is_write ? UringOperation::kWrite : UringOperation::kRead, file_.descriptor(),
                  operation.address + operation.done_bytes, operation.transfer_bytes - operation.done_bytes,
                  operation.file_offset + operation.done_bytes, slot);
  }

  void submit_and_wait() {
    const int result = ring_.enter();
    if (result == 0) refusals_ = 0;
    if (result == 0 || result == -EINTR) return;
    if ((result == -EAGAIN || result == -EBUSY) && ++refusals_ <= kMostRefusals) {
      std::this_thread::sleep_for(kPauseAfterRefusal);
      return;
    }
    // The kernel has not seen what it did not take, so this may fail; the rest must be waited for.
    while (const std::optional<uint64_t> slot = ring_.take_back()) {
      fail(slots_[*slot], -result, "io_uring_enter for " + file_.path());
      free(*slot);
    }
    if (free_slots_.size() < slots_.size()) std::this_thread::sleep_for(kPauseAfterRefusal);
  }

  void end_transfer(const UringCompletion& completion) {
    BlockOperation& operation = slots_[completion.user_data];
    const int result = calls_->uring_result(operation.is_write, completion.result);
    if (advance(operation, result) == Progress::kMore) {
      prepare(completion.user_data);
    } else {
      free(completion.user_data);
    }
  }

  void free(size_t slot) {
    slots_[slot] = {};  // its request would keep the ticket alive
    free_slots_.push_back(slot);
  }

  // the owner's alone
  Uring ring_;
  std::vector<BlockOperation> slots_;
  std::vector<size_t> free_slots_;
  int refusals_ = 0;  // of the kernel, in a row

  std::jthread owner_;
};

}  // namespace

std::unique_ptr<DiskLane> make_uring_lane(std::shared_ptr<SystemCalls> calls, const ScratchFile& file,
                                          size_t depth) {
  return std::make_unique<UringLane>(std::move(calls), file, depth);
}

}  // namespace offload
