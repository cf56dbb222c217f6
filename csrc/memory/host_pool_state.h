// What a pool and its buffers share: the slabs, which of their bytes are free, and the counters.
//
// Ownership: held by the pool and by every live buffer; dies with the last of them, and then returns the
//            pages, at once or (copies in flight) through orphaned_pages.h.
// Threads: public members may be called from any thread of the process that made it, and from no forked
//          child. Two locks, growth_mutex_ before mutex_; neither is held while a ticket is waited for.
// Units: bytes.
// Invariants: as in host_pool.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "base/error.h"
#include "base/fork_guard.h"
#include "base/ticket.h"
#include "device/device.h"
#include "memory/block_map.h"
#include "memory/host_pages.h"
#include "memory/host_pool.h"

namespace offload {

// Rounding up a larger request could overflow, and no machine has this much.
constexpr size_t kLargestRequestBytes = SIZE_MAX / 4;

// What a live HostBuffer owns.
struct HostBlock {
  std::shared_ptr<HostPoolState> pool;
  uintptr_t address = 0;
  size_t requested_bytes = 0;
  size_t block_bytes = 0;
  size_t alignment = 1;  // of what the buffer shows; the block has the room
  Tag tag = Tag::kStaging;
  std::vector<Ticket> tickets;  // the block may be reused after these
};

class HostPoolState {
 public:
  HostPoolState(std::shared_ptr<Device> pool_device, const HostPoolOptions& pool_options);
  ~HostPoolState();

  // Fills in the block's address. False: waited, and nothing came free for `timeout_ns`.
  bool take(HostBlock& block, int64_t timeout_ns);
  void give_back(HostBlock& block) noexcept;
  void reserve(size_t bytes);
  size_t trim();
  HostPoolStats stats();
  void trace_sample();

  const std::shared_ptr<Device> device;
  const HostPoolOptions options;
  const ForkGuard owner;
  const uint32_t number;  // in traces

 private:
  // A block that was given back while a ticket was pending.
  struct Waiting {
    uintptr_t address;
    size_t bytes;
    std::vector<Ticket> tickets;
  };
  using Slabs = std::vector<std::unique_ptr<HostPages>>;

  // These need growth_mutex_, and not mutex_.
  std::unique_ptr<HostPages> obtain(size_t minimum_bytes, size_t preferred_bytes, size_t chunk_bytes);
  void release(Slabs slabs);

  // These need mutex_.
  size_t slab_bytes() const noexcept;
  bool take_free(HostBlock& block);
  void install(std::unique_ptr<HostPages> pages);
  bool is_free(const HostPages& slab) const;
  Slabs detach_free_slabs();
  void reclaim();
  void poison(uintptr_t address, size_t bytes) const noexcept;
  void trace(Tag tag) const noexcept;
  Error over_budget(size_t bytes, const char* purpose) const;

  // Held while pages are obtained or returned, which is slow: one caller at a time, so that the next one
  // finds the new pages instead of mapping its own. Locked before mutex_.
  std::mutex growth_mutex_;

  std::mutex mutex_;
  // guarded by mutex_
  BlockMap blocks_;
  Slabs slabs_;
  std::deque<Waiting> waiting_;  // oldest first
  HostPoolStats counters_;       // mapped_bytes includes pages that are being obtained or returned
};

}  // namespace offload
