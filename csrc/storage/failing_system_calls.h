// System calls that fail on purpose: the n-th of a kind gives an errno, or moves fewer bytes than asked for.
// Reads and writes may be held, too, and let go one by one.
//
// Threads: every member may be called from any thread.
// Invariants: a call that is made to fail is not made, but for half of an allocation, as file systems do;
//             io_uring's reads and writes, and transfers that are shortened, run in full, and only what they
//             say is replaced.
#pragma once

#include <algorithm>
#include <array>
#include <condition_variable>
#include <mutex>
#include <string>
#include <vector>

#include "storage/system_calls.h"

namespace offload {

// clang-format off
enum class SystemCall {
  kOpen, kUnlink, kSetLock, kFileSystem, kSetFlags, kAllocate, kTruncate, kClone, kPread,
  kPwrite, kUringSetup, kUringMap, kUringEnter, kUringRead, kUringWrite
};
// clang-format on
constexpr size_t kSystemCallCount = 15;
const char* system_call_name(SystemCall call) noexcept;

class FailingSystemCalls final : public SystemCalls {
 public:
  // The nth call of the kind from now on (1 = the next), and `count` - 1 after it, fail with `code`.
  // nth 0 disarms.
  void fail(SystemCall call, size_t nth, int code, size_t count = 1);

  // The nth pread, pwrite, kUringRead or kUringWrite from now on says that it moved `bytes` only.
  void shorten(SystemCall call, size_t nth, size_t bytes);

  void pretend_file_system(long type);  // what fstatfs says from now on

  // From now on each pread and pwrite waits until it is let go, all of them until release_transfers().
  struct HeldTransfer {
    bool is_write = false;
    off_t offset = 0;
    size_t bytes = 0;
  };
  void hold_transfers();
  void release_transfers();
  std::vector<HeldTransfer> held_transfers() const;
  // Throws kInvalidArgument where no such one is held.
  void let_go(bool is_write, off_t offset);

  // From now on a clone is a copy of the bytes, on any file system.
  void pretend_clones();

  size_t call_count(SystemCall call) const;  // so far

  int open(const char* path, int flags, mode_t mode) override;
  int unlink(const char* path) override;
  int set_lock(int file, struct flock* lock) override;
  int file_system(int file, struct statfs* facts) override;
  int set_flags(int file, int flags) override;
  int allocate(int file, off_t offset, off_t length) override;
  int truncate(int file, off_t length) override;
  int clone(int file, int original) override;
  ssize_t pread(int file, void* destination, size_t bytes, off_t offset) override;
  ssize_t pwrite(int file, const void* source, size_t bytes, off_t offset) override;
  int uring_setup(unsigned entries, UringParameters* parameters) override;
  int uring_map(int ring, size_t bytes, uint64_t offset, void** address) override;
  int uring_enter(int ring, unsigned submit_count, unsigned wait_count) override;
  int uring_result(bool is_write, int result) override;

 private:
  struct Fault {
    size_t calls_before = 0;  // this many more are made honestly
    size_t count = 0;         // then so many fail; 0: none is armed
    bool is_short = false;
    long value = 0;  // the errno, or the bytes
  };
  struct Verdict {
    bool fails = false;
    bool is_short = false;
    long value = 0;
    int code() const noexcept { return static_cast<int>(-value); }
    ssize_t shortened(ssize_t result) const noexcept { return is_short ? std::min(result, value) : result; }
  };

  Verdict judge(SystemCall call);
  void wait_until_let_go(const HeldTransfer& transfer);

  mutable std::mutex mutex_;
  std::condition_variable let_go_;
  // guarded by mutex_
  std::array<Fault, kSystemCallCount> faults_;
  std::array<size_t, kSystemCallCount> counts_{};
  long file_system_type_ = 0;  // 0: what the kernel says
  bool pretends_clones_ = false;
  bool holds_transfers_ = false;
  std::vector<HeldTransfer> held_;
};

}  // namespace offload
