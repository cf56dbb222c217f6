#include "storage/failing_system_calls.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <memory>
#include <string>

#include "base/error.h"

namespace offload {
namespace {

// Both files may be open for direct transfers: their sizes are multiples of this, as scratch files' are.
constexpr size_t kCopyAlignment = 4096;
constexpr size_t kCopyBytes = size_t{1} << 20;

int copy_bytes(int file, int original) {
  struct stat facts{};
  if (::fstat(original, &facts) < 0 || ::ftruncate(file, facts.st_size) < 0) return -errno;
  const std::unique_ptr<void, decltype(&std::free)> piece(std::aligned_alloc(kCopyAlignment, kCopyBytes),
                                                          &std::free);
  for (off_t offset = 0; offset < facts.st_size; offset += static_cast<off_t>(kCopyBytes)) {
    const size_t bytes = std::min(kCopyBytes, static_cast<size_t>(facts.st_size - offset));
    if (::pread(original, piece.get(), bytes, offset) != static_cast<ssize_t>(bytes)) return -EIO;
    if (::pwrite(file, piece.get(), bytes, offset) != static_cast<ssize_t>(bytes)) return -EIO;
  }
  return 0;
}

}  // namespace

const char* system_call_name(SystemCall call) noexcept {
  static constexpr const char* kNames[kSystemCallCount] = {
      "open",  "unlink", "set_lock",    "file_system", "set_flags",   "allocate",   "truncate",   "clone",
      "pread", "pwrite", "uring_setup", "uring_map",   "uring_enter", "uring_read", "uring_write"};
  return kNames[static_cast<size_t>(call)];
}

void FailingSystemCalls::fail(SystemCall call, size_t nth, int code, size_t count) {
  std::lock_guard lock(mutex_);
  faults_[static_cast<size_t>(call)] =
      nth == 0 ? Fault{} : Fault{.calls_before = nth - 1, .count = count, .is_short = false, .value = code};
}

void FailingSystemCalls::shorten(SystemCall call, size_t nth, size_t bytes) {
  std::lock_guard lock(mutex_);
  faults_[static_cast<size_t>(call)] = {
      .calls_before = nth - 1, .count = 1, .is_short = true, .value = static_cast<long>(bytes)};
}

void FailingSystemCalls::pretend_file_system(long type) {
  std::lock_guard lock(mutex_);
  file_system_type_ = type;
}

void FailingSystemCalls::pretend_clones() {
  std::lock_guard lock(mutex_);
  pretends_clones_ = true;
}

void FailingSystemCalls::hold_transfers() {
  std::lock_guard lock(mutex_);
  holds_transfers_ = true;
}

void FailingSystemCalls::release_transfers() {
  {
    std::lock_guard lock(mutex_);
    holds_transfers_ = false;
    held_.clear();
  }
  let_go_.notify_all();
}

std::vector<FailingSystemCalls::HeldTransfer> FailingSystemCalls::held_transfers() const {
  std::lock_guard lock(mutex_);
  return held_;
}

void FailingSystemCalls::let_go(bool is_write, off_t offset) {
  {
    std::lock_guard lock(mutex_);
    const auto found = std::ranges::find_if(
        held_, [&](const HeldTransfer& held) { return held.is_write == is_write && held.offset == offset; });
    if (found == held_.end()) {
      throw Error(ErrorKind::kInvalidArgument, std::string("no ") + (is_write ? "write" : "read") +
                                                   " at offset " + std::to_string(offset) + " is held");
    }
    held_.erase(found);
  }
  let_go_.notify_all();
}

void FailingSystemCalls::wait_until_let_go(const HeldTransfer& transfer) {
  std::unique_lock lock(mutex_);
  if (!holds_transfers_) return;
  held_.push_back(transfer);
  let_go_.wait(lock, [&] {
    return std::ranges::none_of(held_, [&](const HeldTransfer& held) {
      return held.is_write == transfer.is_write && held.offset == transfer.offset;
    });
  });
}

size_t FailingSystemCalls::call_count(SystemCall call) const {
  std::lock_guard lock(mutex_);
  return counts_[static_cast<size_t>(call)];
}

FailingSystemCalls::Verdict FailingSystemCalls::judge(SystemCall call) {
  std::lock_guard lock(mutex_);
  ++counts_[static_cast<size_t>(call)];
  Fault& fault = faults_[static_cast<size_t>(call)];
  if (fault.count == 0) return {};
  if (fault.calls_before > 0) {
    --fault.calls_before;
    return {};
  }
  --fault.count;
  return {.fails = !fault.is_short, .is_short = fault.is_short, .value = fault.value};
}

int FailingSystemCalls::open(const char* path, int flags, mode_t mode) {
  const Verdict verdict = judge(SystemCall::kOpen);
  return verdict.fails ? verdict.code() : SystemCalls::open(path, flags, mode);
}

int FailingSystemCalls::unlink(const char* path) {
  const Verdict verdict = judge(SystemCall::kUnlink);
  return verdict.fails ? verdict.code() : SystemCalls::unlink(path);
}

int FailingSystemCalls::set_lock(int file, struct flock* lock) {
  const Verdict verdict = judge(SystemCall::kSetLock);
  return verdict.fails ? verdict.code() : SystemCalls::set_lock(file, lock);
}

int FailingSystemCalls::set_flags(int file, int flags) {
  const Verdict verdict = judge(SystemCall::kSetFlags);
  return verdict.fails ? verdict.code() : SystemCalls::set_flags(file, flags);
}

int FailingSystemCalls::allocate(int file, off_t offset, off_t length) {
  const Verdict verdict = judge(SystemCall::kAllocate);
  if (!verdict.fails) return SystemCalls::allocate(file, offset, length);
  SystemCalls::allocate(file, offset, length / 2);
  return verdict.code();
}

int FailingSystemCalls::truncate(int file, off_t length) {
  const Verdict verdict = judge(SystemCall::kTruncate);
  return verdict.fails ? verdict.code() : SystemCalls::truncate(file, length);
}

int FailingSystemCalls::clone(int file, int original) {
  const Verdict verdict = judge(SystemCall::kClone);
  if (verdict.fails) return verdict.code();
  std::unique_lock lock(mutex_);
  const bool pretends = pretends_clones_;
  lock.unlock();
  return pretends ? copy_bytes(file, original) : SystemCalls::clone(file, original);
}

int FailingSystemCalls::uring_setup(unsigned entries, UringParameters* parameters) {
  const Verdict verdict = judge(SystemCall::kUringSetup);
  return verdict.fails ? verdict.code() : SystemCalls::uring_setup(entries, parameters);
}

int FailingSystemCalls::uring_map(int ring, size_t bytes, uint64_t offset, void** address) {
  const Verdict verdict = judge(SystemCall::kUringMap);
  return verdict.fails ? verdict.code() : SystemCalls::uring_map(ring, bytes, offset, address);
}

int FailingSystemCalls::uring_enter(int ring, unsigned submit_count, unsigned wait_count) {
  const Verdict verdict = judge(SystemCall::kUringEnter);
  return verdict.fails ? verdict.code() : SystemCalls::uring_enter(ring, submit_count, wait_count);
}

int FailingSystemCalls::file_system(int file, struct statfs* facts) {
  const Verdict verdict = judge(SystemCall::kFileSystem);
  if (verdict.fails) return verdict.code();
  const int result = SystemCalls::file_system(file, facts);
  std::lock_guard lock(mutex_);
  if (file_system_type_ != 0) facts->f_type = static_cast<decltype(facts->f_type)>(file_system_type_);
  return result;
}

ssize_t FailingSystemCalls::pread(int file, void* destination, size_t bytes, off_t offset) {
  wait_until_let_go({.is_write = false, .offset = offset, .bytes = bytes});
  const Verdict verdict = judge(SystemCall::kPread);
  if (verdict.fails) return verdict.code();
  return verdict.shortened(SystemCalls::pread(file, destination, bytes, offset));
}

ssize_t FailingSystemCalls::pwrite(int file, const void* source, size_t bytes, off_t offset) {
  wait_until_let_go({.is_write = true, .offset = offset, .bytes = bytes});
  const Verdict verdict = judge(SystemCall::kPwrite);
  if (verdict.fails) return verdict.code();
  return verdict.shortened(SystemCalls::pwrite(file, source, bytes, offset));
}

int FailingSystemCalls::uring_result(bool is_write, int result) {
  const Verdict verdict = judge(is_write ? SystemCall::kUringWrite : SystemCall::kUringRead);
  return verdict.fails ? verdict.code() : static_cast<int>(verdict.shortened(result));
}

}  // namespace offload
