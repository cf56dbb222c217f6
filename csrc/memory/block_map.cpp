#include "memory/block_map.h"

#include <iterator>

namespace offload {

void BlockMap::add_region(uintptr_t address, size_t bytes) {
  region_starts_.insert(address);
  insert(address, bytes);
}

bool BlockMap::region_is_free(uintptr_t address, size_t bytes) const {
  auto block = free_.find(address);
  return block != free_.end() && block->second == bytes;
}

void BlockMap::remove_region(uintptr_t address, size_t bytes) {
  if (!region_is_free(address, bytes)) return;
  erase(free_.find(address));
  region_starts_.erase(address);
}

std::optional<uintptr_t> BlockMap::take(size_t bytes) {
  auto smallest = by_size_.lower_bound({bytes, 0});
  if (smallest == by_size_.end()) return std::nullopt;
  auto [block_bytes, address] = *smallest;
  erase(free_.find(address));
  if (block_bytes > bytes) insert(address + bytes, block_bytes - bytes);
  return address;
}

void BlockMap::give_back(uintptr_t address, size_t bytes) {
  auto next = free_.upper_bound(address);
  if (next != free_.end() && next->first == address + bytes && !region_starts_.contains(next->first)) {
    bytes += next->second;
    erase(next++);
  }
  if (next != free_.begin() && !region_starts_.contains(address)) {
    auto previous = std::prev(next);
    if (previous->first + previous->second == address) {
      address = previous->first;
      bytes += previous->second;
      erase(previous);
    }
  }
  insert(address, bytes);
}

void BlockMap::insert(uintptr_t address, size_t bytes) {
  free_.emplace(address, bytes);
  by_size_.emplace(bytes, address);
  free_bytes_ += bytes;
}

void BlockMap::erase(ByAddress::iterator block) {
  free_bytes_ -= block->second;
  by_size_.erase({block->second, block->first});
  free_.erase(block);
}

}  // namespace offload
