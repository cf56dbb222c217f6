#include "storage/uring.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "storage/storage_error.h"

namespace offload {
namespace {

uint32_t load(uint32_t* shared) noexcept {
  return std::atomic_ref<uint32_t>(*shared).load(std::memory_order_acquire);
}
void store(uint32_t* shared, uint32_t value) noexcept {
  std::atomic_ref<uint32_t>(*shared).store(value, std::memory_order_release);
}

Error unavailable(int code, const std::string& doing) {
  std::string reason;
  if (code == EPERM || code == EACCES) {
    reason = "blocked by seccomp (Docker's default profile does) or kernel.io_uring_disabled";
  } else if (code == ENOSYS) {
    reason = "this kernel or sandbox has no io_uring";
  } else {
    return storage_error(code, doing);
  }
  return Error(ErrorKind::kStorage, doing + " failed: " + error_name(code) + ", " + reason, code);
}

}  // namespace

std::string uring_refusal(std::shared_ptr<SystemCalls> calls) {
  try {
    Uring(std::move(calls), 1);
    return {};
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kStorage) throw;
    return error.what();
  }
}

Uring::Uring(std::shared_ptr<SystemCalls> calls, unsigned entry_count) : calls_(std::move(calls)) {
  UringParameters parameters{};
  ring_ = calls_->uring_setup(entry_count, &parameters);
  if (ring_ < 0) throw unavailable(-ring_, "io_uring_setup");
  try {
    constexpr uint32_t kNeeded = kUringFeatureSingleMap | kUringFeatureRwCurrentPosition;
    if ((parameters.features & kNeeded) != kNeeded) {
      throw Error(ErrorKind::kStorage, "io_uring of this kernel is older than Linux 5.6");
    }
    map(parameters);
  } catch (...) {
    unmap();
    throw;
  }
}

Uring::~Uring() { unmap(); }

void Uring::map(const UringParameters& parameters) {
  const auto& submission = parameters.submission;
  const auto& completion = parameters.completion;
  const size_t rings_bytes =
      std::max(submission.array + parameters.submission_entries * sizeof(uint32_t),
               completion.completions + parameters.completion_entries * sizeof(UringCompletion));
  if (int result = calls_->uring_map(ring_, rings_bytes, kUringRingsOffset, &rings_); result < 0) {
    rings_ = nullptr;
    throw unavailable(-result, "mapping the rings of io_uring");
  }
  rings_bytes_ = rings_bytes;
  const size_t entries_bytes = parameters.submission_entries * sizeof(UringEntry);
  if (int result = calls_->uring_map(ring_, entries_bytes, kUringEntriesOffset, &entries_map_); result < 0) {
    entries_map_ = nullptr;
    throw unavailable(-result, "mapping the entries of io_uring");
  }
  entries_bytes_ = entries_bytes;

  auto* const base = static_cast<char*>(rings_);
  const auto word = [base](uint32_t offset) { return reinterpret_cast<uint32_t*>(base + offset); };
  submission_head_ = word(submission.head);
  submission_tail_ = word(submission.tail);
  submission_array_ = word(submission.array);
  submission_mask_ = *word(submission.ring_mask);
  entries_ = static_cast<UringEntry*>(entries_map_);
  completion_head_ = word(completion.head);
  completion_tail_ = word(completion.tail);
  completion_mask_ = *word(completion.ring_mask);
  completions_ = reinterpret_cast<UringCompletion*>(base + completion.completions);
}

void Uring::unmap() noexcept {
  if (entries_map_ != nullptr) ::munmap(entries_map_, entries_bytes_);
  if (rings_ != nullptr) ::munmap(rings_, rings_bytes_);
  ::close(ring_);
}

void Uring::prepare(UringOperation operation, int file, void* address, uint32_t bytes, uint64_t offset,
                    uint64_t user_data) noexcept {
  const uint32_t tail = *submission_tail_;  // only we move it
  UringEntry& entry = entries_[tail & submission_mask_];
  entry = {};
  entry.operation = static_cast<uint8_t>(operation);
  entry.file = file;
  entry.offset = offset;
  entry.address = reinterpret_cast<uint64_t>(address);
  entry.bytes = bytes;
  entry.user_data = user_data;
  submission_array_[tail & submission_mask_] = tail & submission_mask_;
  store(submission_tail_, tail + 1);
}

int Uring::enter() noexcept {
  const uint32_t prepared = *submission_tail_ - load(submission_head_);
  const bool has_completion = *completion_head_ != load(completion_tail_);
  if (prepared == 0 && has_completion) return 0;
  const int result = calls_->uring_enter(ring_, prepared, has_completion ? 0 : 1);
  return std::min(result, 0);
}

std::optional<uint64_t> Uring::take_back() noexcept {
  const uint32_t tail = *submission_tail_;
  if (tail == load(submission_head_)) return std::nullopt;
  store(submission_tail_, tail - 1);
  return entries_[(tail - 1) & submission_mask_].user_data;
}

std::optional<UringCompletion> Uring::complete() noexcept {
  const uint32_t head = *completion_head_;  // only we move it
  if (head == load(completion_tail_)) return std::nullopt;
  const UringCompletion completion = completions_[head & completion_mask_];
  store(completion_head_, head + 1);
  return completion;
}

}  // namespace offload
