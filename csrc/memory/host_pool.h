// All host memory that the engine uses, under one byte budget.
//
// Ownership: the pool owns slabs of pages; a HostBuffer owns one block and gives it back when it dies.
//            Buffers keep the pool's storage alive, so pool and buffers may die in any order.
// Threads: every member may be called from any thread. In a forked child calls throw kState; buffers and
//          pool die there without touching pages, which the child does not have.
// Units: bytes; blocks are 256-byte aligned and rounded up to 256, never to a power of two.
// Invariants: mapped bytes <= budget; a block is handed out again only after the ticket that last
//             touched it ended; no block crosses from one registration into another.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/ticket.h"
#include "device/device.h"

namespace offload {

struct HostPoolOptions {
  size_t budget_bytes = SIZE_MAX;
  size_t slab_bytes = size_t{64} << 20;       // pages are obtained in steps of this, at first of less
  bool pin = false;                           // register the slabs with the device
  bool huge_pages = true;                     // MADV_HUGEPAGE
  int numa_node = -1;                         // -1: the kernel decides
  bool poison = false;                        // free bytes hold 0xFF (NaN in every float format)
  size_t pin_chunk_bytes = size_t{64} << 30;  // one registration holds at most this, or one larger block
  bool address_space_only = false;            // addresses without memory: shows what a layout costs
};

enum class Tag : uint8_t {
  kWeights,
  kMaster,
  kMoments,
  kGradients,
  kActivations,
  kStaging,
  kWindow,
  kBackups
};
constexpr size_t kTagCount = 8;
const char* tag_name(Tag tag) noexcept;
constexpr uint8_t traced_kind(Tag tag) noexcept { return static_cast<uint8_t>(tag) + 1; }  // see TraceLabel

struct HostPoolStats {
  size_t budget_bytes = 0;
  size_t mapped_bytes = 0;     // obtained from the system
  size_t pinned_bytes = 0;     // of these, registered with the device
  size_t used_bytes = 0;       // in live buffers, rounded to blocks
  size_t requested_bytes = 0;  // what callers asked for
  size_t peak_used_bytes = 0;
  size_t waiting_bytes = 0;  // given back, but a ticket is still pending
  size_t live_count = 0;
  std::array<size_t, kTagCount> tag_bytes{};       // of used_bytes, by Tag
  std::array<size_t, kTagCount> tag_peak_bytes{};  // the most of each; their sum is not peak_used_bytes
  bool pin_refused = false;                        // pages are pageable although pinning was asked for
  std::string pin_refusal;                         // why
};

class HostPool;
class HostPoolState;
struct HostBlock;

class HostBuffer {
 public:
  HostBuffer();  // empty
  HostBuffer(HostBuffer&&) noexcept;
  HostBuffer& operator=(HostBuffer&&) noexcept;
  ~HostBuffer();  // gives the block back; it is reused only after the tickets of release_after

  void* address() const noexcept;
  size_t size_bytes() const noexcept;  // as requested
  Tag tag() const noexcept;

  // The block may be reused only after `ticket` too.
  void release_after(const Ticket& ticket);

 private:
  friend class HostPool;
  explicit HostBuffer(std::unique_ptr<HostBlock> block) noexcept;
  void give_back() noexcept;

  std::unique_ptr<HostBlock> block_;
};

class HostPool {
 public:
  HostPool(std::shared_ptr<Device> device, HostPoolOptions options);
  ~HostPool();
  HostPool(const HostPool&) = delete;
  HostPool& operator=(const HostPool&) = delete;

  // Obtains (and pins) pages now, so that acquire() need not: exactly `bytes`, rounded up to pages, beside
  // what is free. Throws as acquire() does.
  void reserve(size_t bytes);

  // Throws kOutOfHostMemory with the numbers, and changes nothing, when the budget cannot hold it. A block
  // whose ticket is pending is waited for only when nothing else fits. Zero bytes are legal and take a block.
  // `alignment` (a power of two) above 256 costs that much more room.
  HostBuffer acquire(size_t bytes, Tag tag, size_t alignment = 1);

  // As acquire(), but gives up (no value) when it waits and no block comes free for `timeout_ns`.
  std::optional<HostBuffer> acquire_within(size_t bytes, Tag tag, int64_t timeout_ns, size_t alignment = 1);

  // Gives whole free slabs back to the system; returns how many bytes.
  size_t trim();

  HostPoolStats stats() const;

  // Records the bytes in use of every tag, as each change of them is recorded while the trace is on.
  void trace_sample() const;

 private:
  std::shared_ptr<HostPoolState> state_;
};

// What a pool maps for blocks of these sizes, acquired in this order with or without reserving their sum
// first. Touches no memory, so the sizes may exceed the machine.
HostPoolStats layout_stats(const std::vector<size_t>& sizes_bytes, bool reserve_first,
                           const HostPoolOptions& options);

}  // namespace offload
