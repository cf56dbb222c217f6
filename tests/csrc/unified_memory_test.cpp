// Blocks and torch's functions from many threads at once; what a caller sees of them is in
// tests/python/test_unified_*.
#include "unified/unified_memory.h"

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "driver_double/driver_double.h"
#include "unified/torch_allocator.h"

namespace offload {
namespace {

constexpr size_t kBytes = 10000;
constexpr int kThreads = 4;
constexpr int kRounds = 25;

void in_threads(void (*body)()) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(body);
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(double_live("managed"), 0u);
  CHECK_EQ(std::string(double_first_misuse()), "");
}

void use_block() {
  const UnifiedMemory memory(0, DRIVER_DOUBLE_PATH);
  PlacementHints hints;
  hints.preferred_location = Side::kDevice;
  for (int i = 0; i < kRounds; ++i) {
    const auto block = memory.allocate(kBytes, UnifiedKind::kManaged, hints, 0);
    const uintptr_t address = block->address();
    std::memset(reinterpret_cast<void*>(address), i, kBytes);
    block->prefetch(address, kBytes, Side::kHost, nullptr);
    CHECK(block->discard(address, kBytes, nullptr));
    CHECK(block->placement(address, kBytes).hints.preferred_location == Side::kDevice);
    CHECK(UnifiedBlock::find(address + 1, kBytes - 1) == block);
    CHECK(memory.live_managed_bytes() >= kBytes);
  }
}

void use_functions() {
  for (int i = 0; i < kRounds; ++i) {
    void* address = offload_unified_alloc(kBytes, 0, nullptr);
    CHECK(address != nullptr);
    std::memset(address, i, kBytes);
    CHECK(UnifiedBlock::find(reinterpret_cast<uintptr_t>(address), kBytes) != nullptr);
    offload_unified_free(address, kBytes, 0, nullptr);
  }
}

// The driver refuses the wait for the device, so that nothing tells whether the memory is still in use.
void a_block_that_ends_in_a_capture_is_freed_with_the_next(UnifiedKind kind) {
  double_set_kind("ats");
  const UnifiedMemory memory(0, DRIVER_DOUBLE_PATH);
  const auto allocate = [&] { return memory.allocate(kBytes, UnifiedKind::kManaged, {}, kBytes); };
  auto first = memory.allocate(kBytes, kind, {}, kBytes);
  auto second = allocate();
  auto third = allocate();
  auto* const bytes = reinterpret_cast<unsigned char*>(first->address());
  bytes[0] = 7;
  const size_t before = double_live("managed");
  double_set_capturing(1);
  first.reset();
  CHECK_EQ(double_live("managed"), before);
  CHECK_EQ(bytes[0], 7);
  CHECK_EQ(double_misuses(), 1u);  // the wait, which loses the capture
  CHECK(UnifiedBlock::find(reinterpret_cast<uintptr_t>(bytes), 1) == nullptr);
  second.reset();
  CHECK_EQ(double_live("managed"), before);
  double_set_capturing(0);
  third.reset();
  CHECK_EQ(double_live("managed"), 0u);
  double_reset();
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  double_reset();
  in_threads(&use_block);
  open_torch_allocator(0, DRIVER_DOUBLE_PATH, 0);
  in_threads(&use_functions);
  CHECK_EQ(last_refusal(0), "");
  a_block_that_ends_in_a_capture_is_freed_with_the_next(UnifiedKind::kManaged);
  a_block_that_ends_in_a_capture_is_freed_with_the_next(UnifiedKind::kSystem);
  return test::result();
}
