// Blocks and torch's functions from many threads at once; what a caller sees of them is in
// tests/python/test_unified_*.
#include "unified/unified_memory.h"

#include <cstring>
#include <iterator>
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

// All that a block can do, in the legacy stream and in one that torch computes on.
void use_everything(CudaStreamHandle stream) {
  const UnifiedMemory memory(0, DRIVER_DOUBLE_PATH);
  PlacementHints hints;
  hints.read_mostly = true;
  hints.preferred_location = Side::kHost;
  const auto block = memory.allocate(kBytes, UnifiedKind::kManaged, hints, kBytes);
  const auto system = memory.allocate(kBytes, UnifiedKind::kSystem, {}, kBytes);
  const uintptr_t address = block->address();
  for (CudaStreamHandle one : {CudaStreamHandle{nullptr}, stream}) {
    block->prefetch(address, kBytes, Side::kDevice, one);
    block->discard(address, kBytes, one);
  }
  block->placement(address, kBytes);
  block->advise(address, kBytes, {});
}

// The nth call of every entry fails: a typed error or none, nothing left alive but what the failing call
// should have given back, and the next block works.
void every_entry_may_fail_at_every_call() {
  struct Case {
    const char* entry;
    bool gives_back;  // or is needed to: then what it refused to give back stays
  };
  const Case cases[] = {
      {"cuDeviceGetAttribute", false},
      {"cuDevicePrimaryCtxRetain", false},
      {"cuDevicePrimaryCtxRelease_v2", true},
      {"cuCtxPushCurrent_v2", true},
      {"cuThreadExchangeStreamCaptureMode", false},
      {"cuMemGetInfo_v2", false},
      {"cuMemAllocManaged", false},
      {"cuMemFree_v2", true},
      {"cuMemAdvise", false},
      {"cuMemPrefetchAsync", false},
      {"cuMemRangeGetAttribute", false},
      {"cuMemDiscardBatchAsync", false},
      {"cuCtxSynchronize", false},
      {"cuStreamCreateWithPriority", false},
      {"cuStreamDestroy_v2", true},
      {"cuStreamWaitEvent", false},
      {"cuEventCreate", false},
      {"cuEventRecord", false},
      {"cuEventDestroy_v2", true},
  };
  const char* const kinds[] = {"contexts", "streams", "events", "managed", "pushed_contexts"};
  double_reset();
  const auto stream = reinterpret_cast<CudaStreamHandle>(double_compute_stream());
  size_t fault_count = 0;
  for (const Case& fault : cases) {
    for (const int lasting : {0, 1}) {
      for (size_t nth = 1;; ++nth) {
        double_reset();
        double_set_kind("ats");
        size_t before[std::size(kinds)];
        for (size_t i = 0; i < std::size(kinds); ++i) before[i] = double_live(kinds[i]);
        double_fail(fault.entry, nth, 719, lasting);
        try {
          use_everything(stream);
        } catch (const Error& error) {
          CHECK(error.kind() == ErrorKind::kDevice);
          CHECK(std::string(error.what()).find("code 719") != std::string::npos);
        }
        const bool reached = double_calls(fault.entry) >= nth;
        fault_count += reached;
        double_fail(fault.entry, 0, 0, 0);
        CHECK_EQ(std::string(double_first_misuse()), "");
        for (size_t i = 0; i < std::size(kinds); ++i) {
          if (!fault.gives_back && double_live(kinds[i]) != before[i]) {
            test::report_failure(__FILE__, __LINE__,
                                 std::string(fault.entry) + " leaves one of the " + kinds[i]);
          }
        }
        if (!reached) break;
      }
    }
  }
  CHECK(fault_count > 60);
  double_reset();
}

void what_the_device_has_not_is_refused() {
  double_reset();
  double_set_free_bytes(kBytes);
  const UnifiedMemory memory(0, DRIVER_DOUBLE_PATH);
  const auto allocate = [&](size_t bytes, UnifiedKind kind) { return memory.allocate(bytes, kind, {}, 0); };
  CHECK_THROWS(ErrorKind::kInvalidArgument, "ask for at least 1", allocate(0, UnifiedKind::kManaged));
  CHECK_THROWS(ErrorKind::kInvalidArgument, "does not read the system's own memory",
               allocate(kBytes, UnifiedKind::kSystem));
  const auto block = allocate(kBytes - 1, UnifiedKind::kManaged);
  CHECK_THROWS(ErrorKind::kInvalidArgument, "Ask for at most 1 bytes", allocate(2, UnifiedKind::kManaged));
  CHECK_THROWS(ErrorKind::kInvalidArgument, "Ask for at most 1 bytes",
               allocate(SIZE_MAX, UnifiedKind::kManaged));
  CHECK(allocate(1, UnifiedKind::kManaged) != nullptr);
  for (const size_t bytes : {size_t{0}, kBytes, SIZE_MAX}) {
    CHECK_THROWS(ErrorKind::kInvalidArgument, "are not inside the block",
                 block->prefetch(block->address(), bytes, Side::kHost, nullptr));
  }
  CHECK_THROWS(ErrorKind::kInvalidArgument, "are not inside the block",
               block->placement(block->address() - 1, 1));
  CHECK(UnifiedBlock::find(block->address(), SIZE_MAX) == nullptr);
  double_set_attribute(83, 0);  // CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY
  CHECK_THROWS(ErrorKind::kInvalidArgument, "has no managed memory: use pinned host memory",
               UnifiedMemory(0, DRIVER_DOUBLE_PATH).allocate(8, UnifiedKind::kManaged, {}, kBytes));
  double_set_attribute(83, 1);
  double_set_kind("integrated");
  const UnifiedMemory shared(0, DRIVER_DOUBLE_PATH);
  PlacementHints hints;
  hints.accessed_by_host = true;
  CHECK_THROWS(ErrorKind::kInvalidArgument, "takes no hints",
               shared.allocate(kBytes, UnifiedKind::kManaged, hints, 2 * kBytes));
  CHECK_THROWS(ErrorKind::kOutOfHostMemory, "the host has 10000 bytes for it",
               shared.allocate(kBytes, UnifiedKind::kManaged, {}, kBytes));
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
  every_entry_may_fail_at_every_call();
  what_the_device_has_not_is_refused();
  return test::result();
}
