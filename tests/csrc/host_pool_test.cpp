#include "memory/host_pool.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "memory/block_map.h"
#include "memory/host_pages.h"

namespace offload::test {
namespace {

constexpr size_t kKiB = 1024;
constexpr size_t kMiB = 1024 * kKiB;

size_t page() { return HostPages::page_bytes(); }

// A device that only locks pages: it records the registered ranges and can refuse one.
class PinningDevice final : public Device {
 public:
  const char* kind() const noexcept override { return "fake"; }
  std::unique_ptr<Stream> create_stream(const std::string&) override { return nullptr; }
  Ticket submit_copies(Stream&, Direction, std::span<const CopySpan>) override { return {}; }
  CopiesTogether copies_together() const noexcept override { return CopiesTogether::kInOneCall; }
  void wait_ticket(Stream&, const Ticket&) override {}
  void wait_compute(Stream&, uintptr_t) override {}
  bool compute_wait(uintptr_t, const Ticket&, int64_t) override { return true; }

  void pin(void* address, size_t bytes) override {
    std::lock_guard lock(mutex_);
    if (++pin_count_ == refused_pin_)
      throw Error(ErrorKind::kDevice, "the limit of locked memory is reached");
    ranges_[reinterpret_cast<uintptr_t>(address)] = bytes;
  }
  void unpin(void* address, size_t bytes) noexcept override {
    std::lock_guard lock(mutex_);
    auto range = ranges_.find(reinterpret_cast<uintptr_t>(address));
    if (range == ranges_.end() || range->second != bytes) {
      report_failure(__FILE__, __LINE__, "unpin of a range that was not pinned");
      return;
    }
    ranges_.erase(range);
  }

  void refuse_pin(size_t nth) { refused_pin_ = nth; }
  std::map<uintptr_t, size_t> ranges() const {
    std::lock_guard lock(mutex_);
    return ranges_;
  }

 private:
  mutable std::mutex mutex_;
  std::map<uintptr_t, size_t> ranges_;
  size_t pin_count_ = 0;
  size_t refused_pin_ = 0;
};

bool is_mapped(uintptr_t address) {
  unsigned char resident = 0;
  return mincore(reinterpret_cast<void*>(address), page(), &resident) == 0;
}

uintptr_t address_of(const HostBuffer& buffer) { return reinterpret_cast<uintptr_t>(buffer.address()); }

void test_block_map_best_fit_and_joining() {
  BlockMap map;
  map.add_region(0x10000, 4096);
  map.add_region(0x11000, 4096);  // touches the first; the two must never be joined
  CHECK(!map.take(8192));
  const uintptr_t first = map.take(1024).value();
  const uintptr_t second = map.take(1024).value();
  const uintptr_t third = map.take(512).value();
  CHECK_EQ(first, 0x10000u);
  CHECK_EQ(second, 0x10400u);
  CHECK_EQ(third, 0x10800u);
  map.give_back(second, 1024);
  CHECK_EQ(map.take(768).value(), second);  // the hole fits better than the rest of the regions
  map.give_back(second, 768);
  map.give_back(first, 1024);
  CHECK(!map.region_is_free(0x10000, 4096));
  map.give_back(third, 512);
  CHECK(map.region_is_free(0x10000, 4096));
  CHECK(map.region_is_free(0x11000, 4096));
  const uintptr_t tail = map.take(4096).value();
  const uintptr_t head = map.take(4096).value();
  map.give_back(tail, 4096);
  map.give_back(head, 4096);
  CHECK(!map.take(4097));
  map.remove_region(0x10000, 4096);
  CHECK_EQ(map.free_bytes(), 4096u);
  CHECK_EQ(map.take(4096).value(), 0x11000u);
}

void test_pages_are_aligned_and_gone_afterwards() {
  const size_t huge = HostPages::huge_page_bytes();
  uintptr_t address = 0;
  {
    HostPages pages(huge > 0 ? huge + 1 : 1, SIZE_MAX, HostPagesOptions{}, nullptr);
    address = pages.address();
    CHECK_EQ(pages.size_bytes(), huge + page());
    CHECK_EQ(address % (huge > 0 ? huge : page()), 0u);
    CHECK(is_mapped(address) && is_mapped(address + huge));
  }
  CHECK(!is_mapped(address));
}

void test_registration_is_chunked() {
  auto device = std::make_shared<PinningDevice>();
  const size_t chunk = 4 * page();
  {
    HostPages pages(10 * page(), chunk, HostPagesOptions{}, device);
    CHECK_EQ(pages.pinned_bytes(), 10 * page());
    auto ranges = device->ranges();
    CHECK_EQ(ranges.size(), 3u);
    CHECK_EQ(ranges[pages.address()], chunk);
    CHECK_EQ(ranges[pages.address() + chunk], chunk);
    CHECK_EQ(ranges[pages.address() + 2 * chunk], 2 * page());
  }
  CHECK(device->ranges().empty());
}

void test_refused_registration_is_undone_and_visible() {
  auto device = std::make_shared<PinningDevice>();
  HostPool pool(device, {.slab_bytes = 12 * page(), .pin = true, .pin_chunk_bytes = 4 * page()});
  device->refuse_pin(3);
  HostBuffer buffer = pool.acquire(page(), Tag::kWeights);  // the pages stay usable
  std::memset(buffer.address(), 1, buffer.size_bytes());
  CHECK(device->ranges().empty());
  HostPoolStats stats = pool.stats();
  CHECK(stats.pin_refused);
  CHECK(stats.pin_refusal.find("locked memory") != std::string::npos);
  CHECK_EQ(stats.pinned_bytes, 0u);
  CHECK_EQ(stats.mapped_bytes, 12 * page());

  pool.reserve(5 * page());  // the next registration is tried again
  CHECK_EQ(pool.stats().pinned_bytes, 5 * page());
  CHECK(pool.stats().pin_refused);  // part of the memory is still pageable
}

void test_no_block_crosses_a_registration() {
  auto device = std::make_shared<PinningDevice>();
  const size_t chunk = 4 * page();
  HostPool pool(device, {.slab_bytes = page(), .pin = true, .pin_chunk_bytes = chunk});
  pool.reserve(4 * chunk);
  std::vector<HostBuffer> buffers;
  for (int i = 0; i < 4; ++i) buffers.push_back(pool.acquire(3 * page(), Tag::kWeights));
  buffers.push_back(
      pool.acquire(3 * chunk, Tag::kWeights));  // larger than a chunk: one registration of its own
  for (const HostBuffer& buffer : buffers) {
    bool inside_one = false;
    for (auto [start, bytes] : device->ranges()) {
      inside_one |= start <= address_of(buffer) && address_of(buffer) + buffer.size_bytes() <= start + bytes;
    }
    CHECK(inside_one);
  }
  CHECK_EQ(pool.stats().mapped_bytes, 7 * chunk);
  buffers.clear();
  CHECK_EQ(pool.trim(), 7 * chunk);
  CHECK(device->ranges().empty());
}

void test_tickets_delay_reuse() {
  HostPool pool(nullptr, {.budget_bytes = 2 * page(), .slab_bytes = page()});
  Ticket copy = Ticket::pending();
  HostBuffer buffer = pool.acquire(page(), Tag::kGradients);
  const uintptr_t address = address_of(buffer);
  buffer.release_after(copy);
  buffer = HostBuffer();
  CHECK_EQ(pool.stats().waiting_bytes, page());
  CHECK_EQ(pool.stats().used_bytes, 0u);

  HostBuffer other = pool.acquire(page(), Tag::kGradients);  // more pages instead of a wait
  CHECK(address_of(other) != address);
  CHECK(!pool.acquire_within(page(), Tag::kGradients, /*timeout_ns=*/0));  // now only the waiting block fits
  // Live bytes alone exceed the budget: no wait could help, so the refusal comes at once.
  CHECK_THROWS(ErrorKind::kOutOfHostMemory, "gradients", pool.acquire(2 * page(), Tag::kMoments));

  std::thread waiter([&] { CHECK_EQ(address_of(pool.acquire(page(), Tag::kGradients)), address); });
  copy.fail(std::make_exception_ptr(Error(ErrorKind::kDevice, "the copy failed")));  // ended is ended
  waiter.join();
  CHECK_EQ(pool.stats().waiting_bytes, 0u);
}

void test_budget_refusal_changes_nothing() {
  HostPool pool(nullptr, {.budget_bytes = 8 * page(), .slab_bytes = 2 * page()});
  HostBuffer kept = pool.acquire(3 * page(), Tag::kMoments);
  const HostPoolStats before = pool.stats();
  CHECK_THROWS(ErrorKind::kOutOfHostMemory, "moments", pool.acquire(6 * page(), Tag::kWeights));
  CHECK_THROWS(ErrorKind::kOutOfHostMemory, "reservation", pool.reserve(6 * page()));
  CHECK_THROWS(ErrorKind::kOutOfHostMemory, "weights", pool.acquire(SIZE_MAX, Tag::kWeights));
  CHECK_THROWS(ErrorKind::kOutOfHostMemory, "reservation", pool.reserve(SIZE_MAX));
  const HostPoolStats after = pool.stats();
  CHECK_EQ(after.mapped_bytes, before.mapped_bytes);
  CHECK_EQ(after.used_bytes, before.used_bytes);
  CHECK_EQ(after.live_count, 1u);
}

void test_refusal_by_the_system_changes_nothing() {
  HostPool pool(nullptr, {});
  CHECK_THROWS(ErrorKind::kOutOfHostMemory, "the system refuses",
               pool.acquire(size_t{1} << 60, Tag::kWeights));
  CHECK_EQ(pool.stats().mapped_bytes, 0u);
  CHECK_EQ(address_of(pool.acquire(1, Tag::kWeights)) % 256, 0u);
}

void test_small_free_slabs_make_room_for_a_large_one() {
  HostPool pool(nullptr, {.budget_bytes = 8 * page(), .slab_bytes = 2 * page()});
  std::vector<HostBuffer> small;
  for (int i = 0; i < 4; ++i) small.push_back(pool.acquire(2 * page(), Tag::kStaging));
  small.erase(small.begin() + 1, small.end());
  HostBuffer large = pool.acquire(6 * page(), Tag::kStaging);
  CHECK_EQ(pool.stats().mapped_bytes, 8 * page());
}

void test_buffers_outlive_the_pool() {
  auto device = std::make_shared<PinningDevice>();
  HostBuffer buffer;
  {
    HostPool pool(device, {.slab_bytes = page(), .pin = true});
    buffer = pool.acquire(100, Tag::kWeights);
  }
  std::memset(buffer.address(), 7, 100);
  CHECK_EQ(device->ranges().size(), 1u);
  buffer = HostBuffer();
  CHECK(device->ranges().empty());
}

void test_pages_outlive_the_pool_while_a_copy_runs() {
  Ticket copy = Ticket::pending();
  uintptr_t address = 0;
  {
    HostPool pool(nullptr, {.slab_bytes = page()});
    HostBuffer buffer = pool.acquire(100, Tag::kGradients);
    address = address_of(buffer);
    buffer.release_after(copy);
  }
  CHECK(is_mapped(address));
  std::memset(reinterpret_cast<void*>(address), 1, 100);  // what the device would still do
  copy.complete();
  {
    HostPool sweeping(nullptr, {});
  }
  CHECK(!is_mapped(address));
}

void test_forked_child_leaves_the_pages_alone() {
  auto device = std::make_shared<PinningDevice>();
  auto pool = std::make_unique<HostPool>(device, HostPoolOptions{.slab_bytes = page(), .pin = true});
  HostBuffer buffer = pool->acquire(100, Tag::kWeights);
  const uintptr_t address = address_of(buffer);
  const pid_t child = fork();
  if (child == 0) {
    CHECK(!is_mapped(address));
    CHECK_THROWS(ErrorKind::kState, "forked", pool->acquire(1, Tag::kWeights));
    buffer = HostBuffer();
    pool.reset();
    CHECK_EQ(device->ranges().size(), 1u);  // not unpinned
    _exit(result());
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK_EQ(status, 0);
  std::memset(buffer.address(), 7, 100);
}

// As with the word that streams wait for, which lives as long as a ticket of its pipeline.
void test_forked_child_unmaps_nothing_of_its_own_at_their_address() {
  auto pages = std::make_unique<HostPages>(page(), page(), HostPagesOptions{.huge_pages = false}, nullptr);
  const uintptr_t address = pages->address();
  const pid_t child = fork();
  if (child == 0) {
    void* const wanted = reinterpret_cast<void*>(address);
    void* const own = mmap(wanted, page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(own == wanted);
    pages.reset();
    CHECK(is_mapped(address));
    _exit(result());
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK_EQ(status, 0);
}

void test_forked_child_has_orphans_of_its_own() {
  {
    const HostPool pool(nullptr, {});
  }  // the parent has looked for some
  const pid_t child = fork();
  if (child == 0) {
    const Ticket copy = Ticket::pending();
    uintptr_t address = 0;
    {
      HostPool pool(nullptr, {.slab_bytes = page()});
      HostBuffer buffer = pool.acquire(100, Tag::kGradients);
      address = address_of(buffer);
      buffer.release_after(copy);
    }
    CHECK(is_mapped(address));
    copy.complete();
    {
      const HostPool sweeping(nullptr, {});
    }
    CHECK(!is_mapped(address));
    _exit(result());
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK_EQ(status, 0);
}

// Each thread stamps its blocks and finds the stamp again: an overlap, or a reuse before the ticket, shows.
void test_threads() {
  constexpr int kThreads = 4;
  constexpr int kRounds = 400;
  HostPool pool(nullptr, {.budget_bytes = 3 * kMiB, .slab_bytes = 256 * kKiB, .poison = true});
  std::vector<std::thread> threads;
  for (int id = 0; id < kThreads; ++id) {
    threads.emplace_back([&, id] {
      uint32_t random = 12345u + static_cast<uint32_t>(id);
      std::vector<std::pair<HostBuffer, unsigned char>> held;
      Ticket last;  // ends one round later, on this thread
      for (int round = 0; round < kRounds; ++round) {
        random = random * 1664525u + 1013904223u;
        const auto stamp = static_cast<unsigned char>(random >> 24);
        const size_t bytes = (random >> 8) % (96 * kKiB);
        try {
          // Without waiting: the tickets of this test end on threads that need the pool themselves.
          if (auto buffer =
                  pool.acquire_within(bytes, static_cast<Tag>(random % kTagCount), /*timeout_ns=*/0)) {
            std::memset(buffer->address(), stamp, bytes);
            held.emplace_back(std::move(*buffer), stamp);
          }
        } catch (const Error& error) {
          CHECK(error.kind() == ErrorKind::kOutOfHostMemory);
        }
        last.complete();
        if (held.size() > 8) {
          auto& [buffer, expected] = held[random % held.size()];
          const auto* seen = static_cast<const unsigned char*>(buffer.address());
          for (size_t i = 0; i < buffer.size_bytes(); i += 97) CHECK_EQ(seen[i], expected);
          last = Ticket::pending();
          buffer.release_after(last);
          std::swap(held[random % held.size()], held.back());
          held.pop_back();
        }
        if (round % 64 == 0) static_cast<void>(pool.trim());
        CHECK(pool.stats().mapped_bytes <= 3 * kMiB);
      }
      last.complete();
    });
  }
  for (std::thread& thread : threads) thread.join();
  const HostPoolStats stats = pool.stats();
  CHECK_EQ(stats.live_count, 0u);
  CHECK_EQ(stats.used_bytes + stats.requested_bytes + stats.waiting_bytes, 0u);
  CHECK_EQ(pool.trim(), stats.mapped_bytes);
}

}  // namespace
}  // namespace offload::test

int main() {
  using namespace offload::test;
  test_block_map_best_fit_and_joining();
  test_pages_are_aligned_and_gone_afterwards();
  test_registration_is_chunked();
  test_refused_registration_is_undone_and_visible();
  test_no_block_crosses_a_registration();
  test_tickets_delay_reuse();
  test_budget_refusal_changes_nothing();
  test_refusal_by_the_system_changes_nothing();
  test_small_free_slabs_make_room_for_a_large_one();
  test_buffers_outlive_the_pool();
  test_pages_outlive_the_pool_while_a_copy_runs();
  test_forked_child_leaves_the_pages_alone();
  test_forked_child_unmaps_nothing_of_its_own_at_their_address();
  test_forked_child_has_orphans_of_its_own();
  test_threads();
  return result();
}
