#include <thread>
#include <utility>

#include "base/thread.h"
#include "storage/disk_lane.h"

namespace offload {
namespace {

class ThreadLane final : public DiskLane {
 public:
  ThreadLane(std::shared_ptr<SystemCalls> calls, const ScratchFile& file, size_t thread_count)
      : DiskLane(std::move(calls), file) {
    try {
      for (size_t i = 0; i < thread_count; ++i)
        threads_.push_back(start_thread("offload-disk", [this](std::stop_token) { run(); }));
    } catch (...) {
      queue_.close();  // else those that started would wait for ever, and be waited for
      throw;
    }
  }

  ~ThreadLane() override {
    queue_.close();
    threads_.clear();  // joins
  }

 private:
  void run() {
    while (std::optional<BlockOperation> operation = queue_.start()) {
      if (begin(*operation) == Progress::kEnded) continue;
      while (advance(*operation, transfer(*operation)) == Progress::kMore) {
      }
    }
  }

  int64_t transfer(const BlockOperation& operation) {
    char* const address = operation.address + operation.done_bytes;
    const size_t bytes = operation.transfer_bytes - operation.done_bytes;
    const auto offset = static_cast<off_t>(operation.file_offset + operation.done_bytes);
    return operation.is_write ? calls_->pwrite(file_.descriptor(), address, bytes, offset)
                              : calls_->pread(file_.descriptor(), address, bytes, offset);
  }

  std::vector<std::jthread> threads_;
};

}  // namespace

std::unique_ptr<DiskLane> make_thread_lane(std::shared_ptr<SystemCalls> calls, const ScratchFile& file,
                                           size_t thread_count) {
  return std::make_unique<ThreadLane>(std::move(calls), file, thread_count);
}

}  // namespace offload
