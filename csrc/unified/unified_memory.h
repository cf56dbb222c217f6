// Memory that host and device read at one address: managed by the driver, or the system's own.
//
// Ownership: a block gives its memory back with its last owner, once all work of the device has ended; it
//            keeps the context, and a forked child leaks it.
// Threads: every member may be called from any thread.
// Stream order: a prefetch and a discard are work of the stream they are given; the rest is done by the call.
// Units: bytes; ranges are absolute addresses and lie inside the block. Hints and prefetches are of whole
//        pages, those that a range only touches too; a discard is of the pages that lie inside.
// Invariants: live managed memory fits what the device has free when a block is made, see require_room().
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "device/cuda_context.h"
#include "device/cuda_memory_facts.h"
#include "memory/host_pages.h"

namespace offload {

enum class UnifiedKind {
  kManaged,  // cuMemAllocManaged
  kSystem,   // pages of the host, where the device reads those (hmm, ats)
};

enum class Side { kHost, kDevice };

// What the driver is told of a range. Without hints it moves pages to whoever touches them.
struct PlacementHints {
  std::optional<Side> preferred_location;  // pages stay there, and the other side maps them if it can
  bool accessed_by_host = false;           // always mapped there, so that its accesses never fault
  bool accessed_by_device = false;
  bool read_mostly = false;  // both sides have a copy until one writes
  bool any() const { return preferred_location || accessed_by_host || accessed_by_device || read_mostly; }
};

struct Placement {
  PlacementHints hints;
  std::optional<Side> last_prefetch;
};

class UnifiedBlock;

// The unified memory of one device.
class UnifiedMemory {
 public:
  // Throws kDevice as CudaDriver::load and find_cuda_device do.
  explicit UnifiedMemory(int index, const std::string& driver_path = "");

  const CudaMemoryFacts& facts() const noexcept { return facts_; }

  // Not initialised. `host_bytes`: how many bytes of host memory new blocks may take. Throws kInvalidArgument
  // when the device does not take the kind or the hints, or when managed memory would not fit the free memory
  // of a discrete device; kOutOfHostMemory when it would not fit the host; kDevice when the driver refuses.
  std::shared_ptr<UnifiedBlock> allocate(size_t bytes, UnifiedKind kind, const PlacementHints& hints,
                                         size_t host_bytes) const;

  size_t live_managed_bytes() const;  // of all blocks of this device, whoever made them

 private:
  void require_kind(UnifiedKind kind) const;
  void require_room(size_t bytes, UnifiedKind kind, size_t host_bytes) const;

  const int index_;
  const CudaDriver& driver_;
  const CudaOrdinal ordinal_;
  const CudaMemoryFacts facts_;
  const std::shared_ptr<CudaPrimaryContext> context_;
};

class UnifiedBlock {
 public:
  ~UnifiedBlock();
  UnifiedBlock(const UnifiedBlock&) = delete;
  UnifiedBlock& operator=(const UnifiedBlock&) = delete;

  // The live block that holds the whole range; null when there is none, and in a forked child.
  static std::shared_ptr<UnifiedBlock> find(uintptr_t address, size_t bytes);

  uintptr_t address() const noexcept { return address_; }
  size_t size_bytes() const noexcept { return bytes_; }
  UnifiedKind kind() const noexcept { return kind_; }
  int index() const noexcept { return index_; }

  // The hints of the range, in place of those that it had. Throws kInvalidArgument where the device takes
  // none.
  void advise(uintptr_t address, size_t bytes, const PlacementHints& hints) const;
  // Where all pages of the range agree; what they do not agree in is absent.
  Placement placement(uintptr_t address, size_t bytes) const;
  // Moves the pages ahead of their use. Throws kInvalidArgument where the device moves none.
  void prefetch(uintptr_t address, size_t bytes, Side side, CudaStreamHandle stream) const;
  // The bytes are not needed any more: no side has to move them. They are undefined until written. False when
  // the driver (before CUDA 13) or the device cannot.
  bool discard(uintptr_t address, size_t bytes, CudaStreamHandle stream) const;

  // The memory was given back by somebody else: the end of the block does nothing.
  void abandon() noexcept { abandoned_ = true; }

 private:
  friend class UnifiedMemory;
  UnifiedBlock(int index, CudaOrdinal ordinal, const CudaMemoryFacts& facts,
               std::shared_ptr<CudaPrimaryContext> context, UnifiedKind kind, size_t bytes);

  void require_migration(const char* what) const;
  void require_inside(uintptr_t address, size_t bytes) const;
  void advise_one(uintptr_t address, size_t bytes, int advice, int location) const;
  int location_of(Side side) const noexcept;
  std::optional<Side> side_of(int location) const noexcept;

  const int index_;
  const CudaOrdinal ordinal_;
  const CudaMemoryFacts facts_;
  const std::shared_ptr<CudaPrimaryContext> context_;
  const UnifiedKind kind_;
  const size_t bytes_;
  uintptr_t address_ = 0;
  std::unique_ptr<HostPages> pages_;  // of kSystem
  bool abandoned_ = false;
};

}  // namespace offload
