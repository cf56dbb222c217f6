// Managed memory: host memory with hints a page, which the double only remembers.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

#include "driver_double/state.h"

using namespace driver_double;

namespace {

constexpr uintptr_t kPage = 4096;
constexpr size_t kAlignment = size_t{64} << 10;
constexpr int kHost = -1;       // CU_DEVICE_CPU
constexpr int kNowhere = -2;    // CU_DEVICE_INVALID
constexpr int kGarbage = 0xDD;  // what discarded pages hold

uintptr_t first_page(uintptr_t address) { return address / kPage * kPage; }
uintptr_t page_end(uintptr_t end) { return (end + kPage - 1) / kPage * kPage; }

bool migrates() { return state().kind != "integrated"; }

// 0 when the driver takes the range: all of it in one allocation, or `system` memory where the device reads
// it ("a valid, host-accessible region").
int check_range(uintptr_t address, size_t bytes, bool system = true) {
  if (bytes == 0) return kInvalidValue;
  const auto& managed = state().managed;
  auto found = managed.upper_bound(address);
  if (found != managed.begin() && address < std::prev(found)->first + std::prev(found)->second) {
    --found;
    return address + bytes <= found->first + found->second ? kSuccess : kInvalidValue;
  }
  return system && reads_pageable() && is_mapped(address, bytes) ? kSuccess : kInvalidValue;
}

int check_location(int location) {
  if (location != kHost && (location < 0 || location >= state().device_count)) return kInvalidDevice;
  return location == kHost || migrates() ? kSuccess : kInvalidDevice;
}

template <typename Change>
void change_pages(uintptr_t address, size_t bytes, Change change) {
  for (uintptr_t page = first_page(address); page < address + bytes; page += kPage)
    change(state().pages[page]);
}

// What all pages of the range agree in, or `otherwise`.
template <typename Read>
int agreed(uintptr_t address, size_t bytes, int otherwise, Read read) {
  const int first = read(state().pages[first_page(address)]);
  bool same = true;
  change_pages(address, bytes, [&](const Page& page) { same &= read(page) == first; });
  return same ? first : otherwise;
}

}  // namespace

extern "C" {

int cuCtxSynchronize() {
  Call call("cuCtxSynchronize", Needs::kContext);
  if (call.refused()) return call.code();
  return drain(call.lock());
}

int cuMemAllocManaged(unsigned long long* address, size_t bytes, unsigned flags) {
  Call call("cuMemAllocManaged", Needs::kContext);
  if (call.refused()) return call.code();
  constexpr int kManagedMemory = 83;  // CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY
  if (attribute_of_devices(kManagedMemory) == 0) return kNotSupported;
  if (bytes == 0 || (flags != 1 && flags != 2)) return kInvalidValue;
  void* memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (memory == nullptr) return kOutOfMemory;
  std::memset(memory, kGarbage, bytes);
  state().order.forget(reinterpret_cast<uintptr_t>(memory), bytes);
  state().managed.emplace(reinterpret_cast<uintptr_t>(memory), bytes);
  *address = reinterpret_cast<uintptr_t>(memory);
  return kSuccess;
}

int cuMemFree_v2(unsigned long long address) {
  Call call("cuMemFree_v2", Needs::kGiveBack);
  if (call.refused()) return call.code();
  State& all = state();
  const auto found = all.managed.find(address);
  if (found == all.managed.end()) {
    all.misuse("freeing what is not allocated");
    return kInvalidValue;
  }
  if (is_copied(address, found->second)) all.misuse("freeing memory that a queued copy uses");
  all.order.operate(Order::kDefault, "cuMemFree", {{found->first, found->second, Use::kWrite}});
  all.order.forget(found->first, found->second);
  all.pages.erase(all.pages.lower_bound(address), all.pages.lower_bound(page_end(address + found->second)));
  std::free(reinterpret_cast<void*>(address));
  all.managed.erase(found);
  return all.lost;
}

int cuMemAdvise(unsigned long long address, size_t bytes, int advice, int location) {
  Call call("cuMemAdvise", Needs::kContext);
  if (call.refused()) return call.code();
  if (const int code = check_range(address, bytes); code != kSuccess) return code;
  if (const int code = check_location(location); code != kSuccess) return code;
  if (advice < 1 || advice > 6) return kInvalidValue;
  change_pages(address, bytes, [&](Page& page) {
    switch (advice) {
      case 1: page.read_mostly = true; break;
      case 2: page.read_mostly = false; break;
      case 3: page.preferred_location = location; break;
      case 4: page.preferred_location = kNowhere; break;
      case 5: page.accessed_by.insert(location); break;
      default: page.accessed_by.erase(location);
    }
  });
  return kSuccess;
}

int cuMemPrefetchAsync(unsigned long long address, size_t bytes, int location, void* stream) {
  Call call("cuMemPrefetchAsync", Needs::kContext);
  if (call.refused()) return call.code();
  if (const int code = check_range(address, bytes); code != kSuccess) return code;
  if (!migrates()) return kInvalidDevice;
  if (const int code = check_location(location); code != kSuccess) return code;
  if (stream != nullptr && !is_stream(stream)) return kInvalidHandle;
  change_pages(address, bytes, [&](Page& page) { page.last_prefetch = location; });
  return kSuccess;
}

int cuMemRangeGetAttribute(void* value, size_t value_bytes, int attribute, unsigned long long address,
                           size_t bytes) {
  Call call("cuMemRangeGetAttribute", Needs::kContext);
  if (call.refused()) return call.code();
  if (const int code = check_range(address, bytes, /*system=*/false); code != kSuccess) return code;
  const size_t count = value_bytes / sizeof(int);
  if (count == 0 || value_bytes % sizeof(int) != 0 || (count > 1 && attribute != 3)) return kInvalidValue;
  int* values = static_cast<int*>(value);
  switch (attribute) {
    case 1:
      *values = agreed(address, bytes, 0, [](const Page& page) { return int{page.read_mostly}; });
      return kSuccess;
    case 2:
      *values = agreed(address, bytes, kNowhere, [](const Page& page) { return page.preferred_location; });
      return kSuccess;
    case 3: {
      std::set<int> everywhere = state().pages[first_page(address)].accessed_by;
      change_pages(address, bytes, [&](const Page& page) {
        std::erase_if(everywhere, [&](int location) { return !page.accessed_by.contains(location); });
      });
      std::fill_n(values, count, kNowhere);
      std::ranges::copy_n(everywhere.begin(), std::min(everywhere.size(), count), values);
      return kSuccess;
    }
    case 4:
      *values = agreed(address, bytes, kNowhere, [](const Page& page) { return page.last_prefetch; });
      return kSuccess;
    default: return kInvalidValue;
  }
}

// Rounds outwards, the worst for a caller, and does not wait for the stream.
int cuMemDiscardBatchAsync(unsigned long long* addresses, size_t* sizes, size_t count,
                           unsigned long long flags, void* stream) {
  Call call("cuMemDiscardBatchAsync", Needs::kContext);
  if (call.refused()) return call.code();
  if (count == 0 || flags != 0 || !migrates()) return kInvalidValue;
  if (stream == nullptr) {
    state().misuse("a batch in the legacy stream");
    return kInvalidValue;
  }
  if (!is_stream(stream)) return kInvalidHandle;
  for (size_t i = 0; i < count; ++i) {
    if (const int code = check_range(addresses[i], sizes[i]); code != kSuccess) return code;
  }
  for (size_t i = 0; i < count; ++i) {
    const uintptr_t begin = first_page(addresses[i]), end = page_end(addresses[i] + sizes[i]);
    state().order.operate(reinterpret_cast<uintptr_t>(stream), "cuMemDiscardBatchAsync",
                          {{begin, end - begin, Use::kWrite}});
    std::memset(reinterpret_cast<void*>(begin), kGarbage, end - begin);
  }
  return kSuccess;
}

}  // extern "C"
