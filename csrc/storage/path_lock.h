// One process at a time uses a directory of disk_path: a lock file in it says which.
//
// Ownership: a PathLock is one user; the last user in the process removes the lock file. The system releases
//            the lock of a process that dies, so no lock is ever stale.
// Threads: every member may be called from any thread.
// Invariants: while the lock is held, a scratch file that has a name belongs to a dead process: taking the
//             lock removes them. A forked child does not have the lock of its parent.
#pragma once

#include <memory>
#include <string>

#include "storage/system_calls.h"

namespace offload {

// Scratch files have this prefix until they lose their name, right after they are opened.
constexpr char kScratchPrefix[] = ".offload-scratch-";
constexpr char kLockName[] = ".offload-lock";

class PathLock {
 public:
  // Throws kStorage when another process has the directory, or the lock file cannot be made.
  PathLock(const std::shared_ptr<SystemCalls>& calls, const std::string& directory);
  ~PathLock();
  PathLock(const PathLock&) = delete;
  PathLock& operator=(const PathLock&) = delete;

  // True when both are users of one directory, whatever it is called.
  bool same_directory(const PathLock& other) const noexcept { return entry_ == other.entry_; }

 private:
  struct Registry;
  struct Entry;

  static Registry& registry();

  Registry* registry_;
  Entry* entry_ = nullptr;
};

}  // namespace offload
