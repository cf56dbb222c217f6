#include "memory/host_pool_state.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <new>
#include <optional>
#include <string>
#include <utility>

#include "base/clock.h"
#include "base/trace_ring.h"
#include "memory/orphaned_pages.h"

namespace offload {
namespace {

constexpr int kPoisonByte = 0xFF;
// What a small model needs beside its states; half a millisecond to obtain.
constexpr size_t kFirstSlabBytes = size_t{8} << 20;
// The ends of slabs that double up to one are less than a slab: a sixteenth of the least budget that is wide.
constexpr size_t kSlabsOfWideBudget = 16;

std::atomic<uint32_t> next_number{0};

std::string format_bytes(size_t bytes) {
  char text[48];
  if (bytes >= size_t{1} << 30) {
    std::snprintf(text, sizeof text, "%.2f GiB", static_cast<double>(bytes) / (size_t{1} << 30));
  } else if (bytes >= size_t{1} << 20) {
    std::snprintf(text, sizeof text, "%.2f MiB", static_cast<double>(bytes) / (size_t{1} << 20));
  } else {
    std::snprintf(text, sizeof text, "%zu bytes", bytes);
  }
  return text;
}

}  // namespace

HostPoolState::HostPoolState(std::shared_ptr<Device> pool_device, const HostPoolOptions& pool_options)
    : device(std::move(pool_device)), options(pool_options), number(next_number.fetch_add(1)) {
  counters_.budget_bytes = options.budget_bytes;
}

HostPoolState::~HostPoolState() {
  reclaim();
  if (!waiting_.empty()) {
    std::vector<Ticket> tickets;
    for (Waiting& block : waiting_)
      std::move(block.tickets.begin(), block.tickets.end(), std::back_inserter(tickets));
    adopt_orphans(std::move(slabs_), std::move(tickets));
  }
  sweep_orphans();
}

bool HostPoolState::take(HostBlock& block, int64_t timeout_ns) {
  {
    std::lock_guard lock(mutex_);
    if (take_free(block)) return true;
    if (block.requested_bytes > kLargestRequestBytes)
      throw over_budget(block.requested_bytes, tag_name(block.tag));
  }
  const size_t needed_bytes = round_up(block.block_bytes, HostPages::page_bytes());
  for (;;) {
    Ticket oldest;
    {
      std::lock_guard growth(growth_mutex_);
      size_t preferred_bytes = needed_bytes;
      {
        std::lock_guard lock(mutex_);
        if (take_free(block)) return true;  // given back meanwhile, or in the pages of another caller
        preferred_bytes = std::max(needed_bytes, slab_bytes());
      }
      std::unique_ptr<HostPages> pages =
          obtain(needed_bytes, preferred_bytes, std::max(needed_bytes, options.pin_chunk_bytes));
      std::lock_guard lock(mutex_);
      if (pages) install(std::move(pages));
      if (take_free(block)) return true;
      if (waiting_.empty() || counters_.used_bytes + block.block_bytes > options.budget_bytes) {
        throw over_budget(block.requested_bytes, tag_name(block.tag));
      }
      oldest = waiting_.front().tickets.front();
    }
    // Nothing else fits. Without the locks: whoever ends this work may need the pool first.
    if (!oldest.wait_ended(timeout_ns)) return false;
  }
}

void HostPoolState::give_back(HostBlock& block) noexcept {
  std::erase_if(block.tickets, [](const Ticket& ticket) { return ticket.done(); });
  if (block.tickets.empty()) poison(block.address, block.block_bytes);
  std::lock_guard lock(mutex_);
  counters_.used_bytes -= block.block_bytes;
  counters_.requested_bytes -= block.requested_bytes;
  counters_.tag_bytes[static_cast<size_t>(block.tag)] -= block.block_bytes;
  --counters_.live_count;
  if (trace_is_on()) trace(block.tag);
  try {
    if (block.tickets.empty()) {
      blocks_.give_back(block.address, block.block_bytes);
    } else {
      waiting_.push_back({block.address, block.block_bytes, std::move(block.tickets)});
      counters_.waiting_bytes += block.block_bytes;
    }
  } catch (const std::bad_alloc&) {
    // Out of memory for a few words: the block stays out of use until the pool dies, which harms nobody.
  }
}

void HostPoolState::reserve(size_t bytes) {
  if (bytes == 0) return;
  std::lock_guard growth(growth_mutex_);
  std::unique_ptr<HostPages> pages;
  if (bytes <= kLargestRequestBytes) {
    const size_t exact_bytes = round_up(bytes, HostPages::page_bytes());
    pages = obtain(exact_bytes, exact_bytes, options.pin_chunk_bytes);
  }
  std::lock_guard lock(mutex_);
  if (!pages) throw over_budget(bytes, "the reservation");
  install(std::move(pages));
}

size_t HostPoolState::trim() {
  std::lock_guard growth(growth_mutex_);
  Slabs surplus;
  {
    std::lock_guard lock(mutex_);
    reclaim();
    surplus = detach_free_slabs();
  }
  size_t bytes = 0;
  for (const auto& slab : surplus) bytes += slab->size_bytes();
  release(std::move(surplus));
  return bytes;
}

HostPoolStats HostPoolState::stats() {
  std::lock_guard lock(mutex_);
  reclaim();
  return counters_;
}

void HostPoolState::trace_sample() {
  std::lock_guard lock(mutex_);
  for (size_t tag = 0; tag < kTagCount && trace_is_on(); ++tag) trace(static_cast<Tag>(tag));
}

void HostPoolState::trace(Tag tag) const noexcept {
  const int64_t now_ns = monotonic_now_ns();
  record_trace(TraceLane::kHostMemory, now_ns, now_ns, counters_.tag_bytes[static_cast<size_t>(tag)],
               {.name = number, .kind = static_cast<uint8_t>(tag)});
}

// Null when the budget forbids `minimum_bytes`. Free slabs that are each too small are returned first when
// that makes the room; otherwise nothing changes.
std::unique_ptr<HostPages> HostPoolState::obtain(size_t minimum_bytes, size_t preferred_bytes,
                                                 size_t chunk_bytes) {
  sweep_orphans();
  Slabs surplus;
  {
    std::lock_guard lock(mutex_);
    size_t reachable_bytes = options.budget_bytes - counters_.mapped_bytes;
    if (reachable_bytes < minimum_bytes) {
      for (const auto& slab : slabs_) reachable_bytes += is_free(*slab) ? slab->size_bytes() : 0;
      if (reachable_bytes < minimum_bytes) return nullptr;
      surplus = detach_free_slabs();
    }
  }
  release(std::move(surplus));
  size_t bytes = 0;
  {
    std::lock_guard lock(mutex_);
    const size_t page = HostPages::page_bytes();
    const size_t room_bytes = (options.budget_bytes - counters_.mapped_bytes) / page * page;
    bytes = std::max(minimum_bytes, std::min(round_up(preferred_bytes, page), room_bytes));
    counters_.mapped_bytes += bytes;
  }
  try {
    const HostPagesOptions pages_options{.huge_pages = options.huge_pages,
                                         .numa_node = options.numa_node,
                                         .poison = options.poison,
                                         .address_space_only = options.address_space_only};
    return std::make_unique<HostPages>(bytes, chunk_bytes, pages_options, options.pin ? device : nullptr);
  } catch (...) {
    std::lock_guard lock(mutex_);
    counters_.mapped_bytes -= bytes;
    throw;
  }
}

void HostPoolState::release(Slabs slabs) {
  for (auto& slab : slabs) {
    const size_t mapped_bytes = slab->size_bytes();
    const size_t pinned_bytes = slab->pinned_bytes();
    slab.reset();
    std::lock_guard lock(mutex_);
    counters_.mapped_bytes -= mapped_bytes;
    counters_.pinned_bytes -= pinned_bytes;
  }
}

// A few bytes of a small model are not worth the 10 ms that 64 MiB take to obtain, and longer to register: a
// pool doubles. Not under a narrow budget, which what the ends of small slabs cannot hold might exceed.
size_t HostPoolState::slab_bytes() const noexcept {
  if (options.budget_bytes / kSlabsOfWideBudget < options.slab_bytes) return options.slab_bytes;
  return std::min(options.slab_bytes, std::max(kFirstSlabBytes, counters_.mapped_bytes));
}

bool HostPoolState::take_free(HostBlock& block) {
  reclaim();
  std::optional<uintptr_t> address = blocks_.take(block.block_bytes);
  if (!address) return false;
  block.address = *address;
  counters_.used_bytes += block.block_bytes;
  counters_.requested_bytes += block.requested_bytes;
  const size_t tag = static_cast<size_t>(block.tag);
  counters_.tag_bytes[tag] += block.block_bytes;
  counters_.tag_peak_bytes[tag] = std::max(counters_.tag_peak_bytes[tag], counters_.tag_bytes[tag]);
  counters_.peak_used_bytes = std::max(counters_.peak_used_bytes, counters_.used_bytes);
  ++counters_.live_count;
  if (trace_is_on()) trace(block.tag);
  return true;
}

void HostPoolState::install(std::unique_ptr<HostPages> pages) {
  counters_.pinned_bytes += pages->pinned_bytes();
  if (!pages->pin_refusal().empty() && !counters_.pin_refused) {
    counters_.pin_refused = true;
    counters_.pin_refusal = pages->pin_refusal();
  }
  slabs_.push_back(std::move(pages));  // first: nothing is handed out of pages that nobody owns
  const HostPages& slab = *slabs_.back();
  for (size_t offset = 0; offset < slab.size_bytes(); offset += slab.chunk_bytes()) {
    blocks_.add_region(slab.address() + offset, std::min(slab.chunk_bytes(), slab.size_bytes() - offset));
  }
}

bool HostPoolState::is_free(const HostPages& slab) const {
  for (size_t offset = 0; offset < slab.size_bytes(); offset += slab.chunk_bytes()) {
    const size_t bytes = std::min(slab.chunk_bytes(), slab.size_bytes() - offset);
    if (!blocks_.region_is_free(slab.address() + offset, bytes)) return false;
  }
  return true;
}

HostPoolState::Slabs HostPoolState::detach_free_slabs() {
  auto first_free =
      std::stable_partition(slabs_.begin(), slabs_.end(), [&](const auto& slab) { return !is_free(*slab); });
  Slabs detached(std::make_move_iterator(first_free), std::make_move_iterator(slabs_.end()));
  slabs_.erase(first_free, slabs_.end());
  for (const auto& slab : detached) {
    for (size_t offset = 0; offset < slab->size_bytes(); offset += slab->chunk_bytes()) {
      blocks_.remove_region(slab->address() + offset,
                            std::min(slab->chunk_bytes(), slab->size_bytes() - offset));
    }
  }
  return detached;
}

// Returns the blocks whose tickets have ended; never blocks.
void HostPoolState::reclaim() {
  std::erase_if(waiting_, [&](Waiting& block) {
    std::erase_if(block.tickets, [](const Ticket& ticket) { return ticket.done(); });
    if (!block.tickets.empty()) return false;
    poison(block.address, block.bytes);
    blocks_.give_back(block.address, block.bytes);
    counters_.waiting_bytes -= block.bytes;
    return true;
  });
}

void HostPoolState::poison(uintptr_t address, size_t bytes) const noexcept {
  if (!options.poison || options.address_space_only) return;
  std::memset(reinterpret_cast<void*>(address), kPoisonByte, bytes);
}

Error HostPoolState::over_budget(size_t bytes, const char* purpose) const {
  std::string used_by_tag;
  for (size_t tag = 0; tag < kTagCount; ++tag) {
    if (counters_.tag_bytes[tag] == 0) continue;
    used_by_tag += std::string(used_by_tag.empty() ? " (" : ", ") + tag_name(static_cast<Tag>(tag)) + " " +
                   format_bytes(counters_.tag_bytes[tag]);
  }
  if (!used_by_tag.empty()) used_by_tag += ")";
  return Error(ErrorKind::kOutOfHostMemory,
               "the host budget cannot hold " + format_bytes(bytes) + " more for " + purpose + ": of " +
                   format_bytes(options.budget_bytes) + ", " + format_bytes(counters_.used_bytes) +
                   " are in use" + used_by_tag + ", " + format_bytes(counters_.waiting_bytes) +
                   " wait for copies to end and " + format_bytes(blocks_.free_bytes()) +
                   " are free in pieces; raise host_budget, offload less, or free buffers");
}

}  // namespace offload
