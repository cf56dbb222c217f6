#include "device/pinned_ranges.h"

#include <algorithm>
#include <iterator>

namespace offload {

void PinnedRanges::add(uintptr_t address, size_t bytes) {
  std::lock_guard lock(mutex_);
  if (bytes_by_start_.emplace(address, bytes).second) total_bytes_ += bytes;
}

void PinnedRanges::remove(uintptr_t address) noexcept {
  std::lock_guard lock(mutex_);
  const auto found = bytes_by_start_.find(address);
  if (found == bytes_by_start_.end()) return;
  total_bytes_ -= found->second;
  bytes_by_start_.erase(found);
}

PinnedRanges::Cut PinnedRanges::cut(uintptr_t address, size_t bytes) const {
  std::lock_guard lock(mutex_);
  Cut cut;
  const uintptr_t end = address + bytes;
  auto next = bytes_by_start_.upper_bound(address);  // the first range behind the address
  while (address < end) {
    uintptr_t edge = next == bytes_by_start_.end() ? end : next->first;
    bool pinned = false;
    if (next != bytes_by_start_.begin()) {
      const auto& [start, range_bytes] = *std::prev(next);
      pinned = address < start + range_bytes;
      if (pinned) edge = start + range_bytes;
    }
    edge = std::min(edge, end);
    cut.parts_bytes.push_back(edge - address);
    cut.pinned &= pinned;
    address = edge;
    while (next != bytes_by_start_.end() && next->first <= address) ++next;
  }
  return cut;
}

std::vector<uintptr_t> PinnedRanges::starts() const {
  std::lock_guard lock(mutex_);
  std::vector<uintptr_t> starts;
  for (const auto& range : bytes_by_start_) starts.push_back(range.first);
  return starts;
}

size_t PinnedRanges::total_bytes() const {
  std::lock_guard lock(mutex_);
  return total_bytes_;
}

}  // namespace offload
