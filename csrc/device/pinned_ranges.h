// Which host memory is registered with a device.
//
// Threads: every member may be called from any thread.
// Units: bytes and addresses.
// Invariants: ranges do not overlap; the driver refuses the registration that would.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

namespace offload {

class PinnedRanges {
 public:
  // A copy's host side, cut at the edges of registrations: the driver refuses a copy that crosses one.
  struct Cut {
    std::vector<size_t> parts_bytes;
    bool pinned = true;  // every part is registered
  };

  void add(uintptr_t address, size_t bytes);
  void remove(uintptr_t address) noexcept;  // the start of a range; nothing where none starts
  Cut cut(uintptr_t address, size_t bytes) const;

  std::vector<uintptr_t> starts() const;
  size_t total_bytes() const;

 private:
  mutable std::mutex mutex_;
  // guarded by mutex_
  std::map<uintptr_t, size_t> bytes_by_start_;
  size_t total_bytes_ = 0;
};

}  // namespace offload
