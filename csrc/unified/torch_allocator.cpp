#include "unified/torch_allocator.h"

#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "base/fork_guard.h"

namespace offload {
namespace {

// No UnifiedMemory: an open device holds no context of ours while torch has none of our memory.
struct Slot {
  std::string driver_path;
  size_t host_bytes = 0;
  std::string refusal = {};
};

// Leaked on purpose: torch frees at exit, after static destructors.
struct Allocator {
  const ForkGuard owner;
  std::mutex mutex;
  // guarded by mutex
  std::map<int, Slot> slots;
  std::map<void*, std::shared_ptr<UnifiedBlock>> blocks;
};

Allocator& allocator() {
  static auto& all = *new Allocator;
  return all;
}

// As for a tensor that the device computes with: it stays there while it fits, and is read from afar where it
// does not. A device that moves no pages takes no hints.
PlacementHints hints_of(const UnifiedMemory& memory) {
  PlacementHints hints;
  if (memory.facts().concurrent_managed_access) {
    hints.preferred_location = Side::kDevice;
    hints.accessed_by_device = true;
  }
  return hints;
}

void* allocate(size_t bytes, int index) {
  Allocator& all = allocator();
  Slot slot;
  {
    std::lock_guard lock(all.mutex);
    const auto found = all.slots.find(index);
    if (found == all.slots.end()) return nullptr;
    slot = found->second;
  }
  try {
    const UnifiedMemory memory(index, slot.driver_path);
    std::shared_ptr<UnifiedBlock> block =
        memory.allocate(bytes, UnifiedKind::kManaged, hints_of(memory), slot.host_bytes);
    auto* address = reinterpret_cast<void*>(block->address());
    std::lock_guard lock(all.mutex);
    std::shared_ptr<UnifiedBlock>& owner = all.blocks[address];
    // Some versions of torch give blocks of a dropped pool to cudaFree instead of to us.
    if (owner) owner->abandon();
    owner = std::move(block);
    return address;
  } catch (const std::exception& refusal) {
    std::lock_guard lock(all.mutex);
    all.slots.at(index).refusal = refusal.what();
    return nullptr;
  }
}

}  // namespace

void open_torch_allocator(int index, const std::string& driver_path, size_t host_bytes) {
  allocator().owner.require_owner("torch's allocator of unified memory");
  const UnifiedMemory memory(index, driver_path);  // throws for a device that is not there
  std::lock_guard lock(allocator().mutex);
  allocator().slots.insert_or_assign(index, Slot{driver_path, host_bytes});
}

std::string last_refusal(int index) {
  allocator().owner.require_owner("torch's allocator of unified memory");
  std::lock_guard lock(allocator().mutex);
  const auto found = allocator().slots.find(index);
  return found == allocator().slots.end() ? "" : found->second.refusal;
}

}  // namespace offload

void* offload_unified_alloc(ssize_t bytes, int device, void*) noexcept {
  using namespace offload;
  if (bytes <= 0 || allocator().owner.forked()) return nullptr;
  try {
    return allocate(static_cast<size_t>(bytes), device);
  } catch (...) {
    return nullptr;  // no memory for the reason either
  }
}

void offload_unified_free(void* address, ssize_t, int, void*) noexcept {
  using namespace offload;
  Allocator& all = allocator();
  if (all.owner.forked()) return;  // the lock may be held for ever
  std::shared_ptr<UnifiedBlock> block;
  {
    std::lock_guard lock(all.mutex);
    const auto found = all.blocks.find(address);
    if (found == all.blocks.end()) return;
    block = std::move(found->second);
    all.blocks.erase(found);
  }
}
