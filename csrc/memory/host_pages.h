// One mapping of host memory: huge pages, a NUMA node, touched by all workers, registered with a device.
//
// Ownership: owns the mapping and its registrations, the destructor undoes both, but in a forked child, where
//            something else may be at these addresses; keeps the device alive.
// Threads: immutable once constructed. The constructor runs on WorkerPool::shared() and blocks.
// Units: bytes; sizes are rounded up to the system's page.
// Invariants: registered as a whole or not at all, in chunks of `chunk_bytes`; CUDA refuses a copy that
//             crosses from one registration into the next, so no block may cross a chunk's end.
//             The pages are absent from forked children (MADV_DONTFORK): a child can neither copy them
//             nor break a transfer into them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/fork_guard.h"
#include "device/device.h"

namespace offload {

struct HostPagesOptions {
  bool huge_pages = true;            // MADV_HUGEPAGE; mappings of at least one huge page are aligned to it
  int numa_node = -1;                // -1: the kernel decides
  bool numa_node_is_a_wish = false;  // nobody asked for the node: one that the system refuses does not count
  bool poison = false;               // filled with 0xFF instead of zero
  bool address_space_only = false;   // addresses without memory: a read or write of them faults
};

class HostPages {
 public:
  // `pin_device`: registers the pages when not null; a refusal leaves them pageable, see pin_refusal().
  // Throws kOutOfHostMemory when the system refuses the mapping, kInvalidArgument for a bad NUMA node.
  HostPages(size_t bytes, size_t chunk_bytes, const HostPagesOptions& options,
            std::shared_ptr<Device> pin_device);
  ~HostPages();
  HostPages(const HostPages&) = delete;
  HostPages& operator=(const HostPages&) = delete;

  uintptr_t address() const noexcept { return mapping_.address; }
  size_t size_bytes() const noexcept { return mapping_.bytes; }
  size_t chunk_bytes() const noexcept { return chunk_bytes_; }
  size_t pinned_bytes() const noexcept { return pinned_bytes_; }
  const std::string& pin_refusal() const noexcept { return pin_refusal_; }  // empty: not refused

  static size_t page_bytes() noexcept;
  static size_t huge_page_bytes() noexcept;  // 0: the system has no transparent huge pages

 private:
  // A member of its own, so that a constructor that throws later still unmaps.
  struct Mapping {
    Mapping(size_t bytes, size_t alignment, bool address_space_only);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    const ForkGuard owner;
    uintptr_t address = 0;
    size_t bytes = 0;
  };

  void advise(const HostPagesOptions& options);
  void touch(bool poison);
  void pin();
  void unpin(size_t bytes) noexcept;

  Mapping mapping_;
  size_t chunk_bytes_;
  std::shared_ptr<Device> pin_device_;
  size_t pinned_bytes_ = 0;
  std::string pin_refusal_;
};

// The smallest multiple of `step` that is not less than `bytes`.
constexpr size_t round_up(size_t bytes, size_t step) noexcept { return (bytes + step - 1) / step * step; }

}  // namespace offload
