// Which bytes of the pool's regions are free: best fit, and neighbours are joined at once.
//
// Ownership: arithmetic on addresses only; never reads or writes the memory behind them.
// Threads: none of its own; the caller holds a lock.
// Units: bytes; callers pass multiples of their own granularity, which is then kept.
// Invariants: free blocks do not overlap; two free neighbours of one region are never separate; no block
//             crosses from one region into the next, even where their addresses touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace offload {

class BlockMap {
 public:
  void add_region(uintptr_t address, size_t bytes);

  // True when no block of the region is taken; only such a region may be removed.
  bool region_is_free(uintptr_t address, size_t bytes) const;
  void remove_region(uintptr_t address, size_t bytes);

  // The smallest free block that holds `bytes`, the lowest address among equals; the rest stays free.
  std::optional<uintptr_t> take(size_t bytes);
  void give_back(uintptr_t address, size_t bytes);

  size_t free_bytes() const noexcept { return free_bytes_; }

 private:
  using ByAddress = std::map<uintptr_t, size_t>;

  void insert(uintptr_t address, size_t bytes);
  void erase(ByAddress::iterator block);

  ByAddress free_;                                  // address -> bytes
  std::set<std::pair<size_t, uintptr_t>> by_size_;  // the same blocks
  std::set<uintptr_t> region_starts_;
  size_t free_bytes_ = 0;
};

}  // namespace offload
