#include "device/host_device.h"

#include <cstring>
#include <thread>
#include <vector>

#include "check.h"

namespace offload {
namespace {

constexpr Direction kLane = Direction::kToDevice;

struct Fixture {
  std::shared_ptr<ManualClock> clock = std::make_shared<ManualClock>();
  HostDevice device;
  std::unique_ptr<Stream> stream;
  std::vector<char> source = std::vector<char>(64, 'x');
  std::vector<char> destination = std::vector<char>(64, '.');

  explicit Fixture(double bytes_per_s = 0)
      : device({.clock = clock, .to_device_bytes_per_s = bytes_per_s}),
        stream(device.create_stream("to_device")) {}

  Ticket copy(size_t offset, size_t bytes) {
    return device.submit_copy(*stream, kLane, destination.data() + offset, source.data() + offset, bytes);
  }
};

void held_copies_run_after_release_and_in_order() {
  Fixture f;
  f.device.hold(kLane);
  const Ticket first = f.copy(0, 8);
  // The second copy reads what the first wrote: any other order shows.
  std::vector<char> chained(8, '.');
  const Ticket second = f.device.submit_copy(*f.stream, kLane, chained.data(), f.destination.data(), 8);
  CHECK_EQ(f.device.pending_count(kLane), 2u);
  CHECK_EQ(f.device.pending_count(Direction::kToHost), 0u);
  CHECK(!first.done());
  CHECK_EQ(f.destination[0], '.');
  f.device.release(kLane);
  second.wait();
  CHECK(first.done());
  CHECK(std::memcmp(chained.data(), f.source.data(), 8) == 0);
  CHECK_EQ(f.device.pending_count(kLane), 0u);
}

void a_small_copy_that_nothing_holds_back_has_ended_at_the_return() {
  Fixture f;
  CHECK(f.copy(0, 8).done());
  CHECK_EQ(f.destination[7], 'x');
  CHECK_EQ(f.device.pending_count(kLane), 0u);
  const Ticket work = Ticket::pending();
  f.device.wait_ticket(*f.stream, work);
  const Ticket behind_work = f.copy(8, 8);
  const Ticket behind_that = f.copy(16, 8);
  CHECK(!behind_work.done() && !behind_that.done());
  work.complete();
  CHECK(behind_that.wait() && behind_work.done());
  f.device.fail_copy(kLane, 1);
  CHECK_THROWS(ErrorKind::kDevice, "copy 1 of lane to_device", f.copy(24, 8).wait());
  CHECK(f.copy(24, 8).wait());
}

void small_copies_overtake_no_large_ones() {
  // Each reads the first byte that the one before it wrote: any other order shows.
  constexpr size_t kLarge = size_t{1} << 20;
  constexpr size_t kCount = 65;
  HostDevice device;
  const auto stream = device.create_stream("to_device");
  std::vector<std::vector<char>> memory(kCount, std::vector<char>(kLarge, '.'));
  memory[0][0] = 'x';
  Ticket last;
  for (size_t i = 1; i < kCount; ++i) {
    const size_t bytes = i % 3 == 1 ? kLarge : 1;
    last = device.submit_copy(*stream, kLane, memory[i].data(), memory[i - 1].data(), bytes);
  }
  last.wait();
  CHECK_EQ(memory[kCount - 1][0], 'x');
}

void nth_copy_fails_alone() {
  Fixture f;
  f.device.hold(kLane);
  f.device.fail_copy(kLane, 2);
  const Ticket first = f.copy(0, 8);
  const Ticket second = f.copy(8, 8);
  const Ticket third = f.copy(16, 8);
  f.device.release(kLane);
  CHECK(first.wait());
  CHECK_THROWS(ErrorKind::kDevice, "copy 2 of lane to_device (8 bytes)", second.wait());
  CHECK(third.wait());
  CHECK_EQ(f.destination[7], 'x');
  CHECK_EQ(f.destination[8], '.');
  CHECK_EQ(f.destination[16], 'x');
  f.device.fail_copy(kLane, 1);
  f.device.fail_copy(kLane, 0);
  CHECK(f.copy(24, 8).wait());
}

void bandwidth_follows_the_clock() {
  Fixture f(1e9);  // a byte a nanosecond
  const Ticket first = f.copy(0, 10);
  const Ticket second = f.copy(10, 20);  // queued behind the first: ends at 30
  f.clock->advance(9);
  CHECK(!first.done());
  CHECK_EQ(f.destination[0], '.');
  f.clock->advance(1);
  first.wait();
  f.clock->advance(19);
  CHECK(!second.done());
  f.clock->advance(1);
  second.wait();
  CHECK_EQ(f.destination[29], 'x');
  // An idle link saves nothing up: the next copy takes its own time from its submission.
  f.clock->advance(1000);
  const Ticket third = f.copy(30, 10);
  f.clock->advance(9);
  CHECK(!third.wait(10'000'000));  // time for a copy that ends too early to show
  f.clock->advance(1);
  third.wait();
}

void a_rate_of_next_to_nothing_ends_no_copy() {
  Fixture f(1e-12);  // 8 bytes take more nanoseconds than 63 bits count
  const Ticket first = f.copy(0, 8);
  const Ticket second = f.copy(8, 8);
  while (f.clock->deadlines_ns().empty() && !first.done()) std::this_thread::yield();
  CHECK_EQ(f.clock->deadlines_ns().size(), 1u);
  for (const int64_t deadline_ns : f.clock->deadlines_ns()) CHECK(deadline_ns > int64_t{1} << 61);
  f.stream.reset();
  CHECK(second.done());
}

void hold_time_does_not_count_as_transfer_time() {
  Fixture f(1e9);
  f.device.hold(kLane);
  const Ticket ticket = f.copy(0, 10);
  f.clock->advance(1000);
  f.device.release(kLane);
  f.clock->advance(9);
  CHECK(!ticket.done());
  f.clock->advance(1);
  ticket.wait();
}

void destruction_ends_held_and_delayed_copies() {
  Fixture f(1);  // a byte a second, on a clock that stands still
  const Ticket delayed = f.copy(0, 8);
  f.device.hold(kLane);
  const Ticket held = f.copy(8, 8);
  f.stream.reset();
  CHECK(delayed.done() && !delayed.error());
  CHECK(held.done() && !held.error());
  CHECK_EQ(f.destination[15], 'x');
  CHECK_EQ(f.device.pending_count(kLane), 0u);
}

void pins_are_counted_and_fail_on_request() {
  HostDevice device;
  char page[16];
  device.fail_pin(2);
  device.pin(page, 16);
  CHECK_THROWS(ErrorKind::kDevice, "cannot pin 8 bytes", device.pin(page, 8));
  device.pin(page, 4);
  CHECK_EQ(device.pinned_bytes(), 20u);
  device.unpin(page, 16);
  CHECK_EQ(device.pinned_bytes(), 4u);
}

void illegal_rates_are_refused() {
  CHECK_THROWS(ErrorKind::kInvalidArgument, "to_host_bytes_per_s",
               HostDevice({.clock = nullptr, .to_host_bytes_per_s = -1}));
}

void ticket_callbacks_run_once() {
  int calls = 0;
  const Ticket ticket = Ticket::pending();
  ticket.on_end([&](const std::exception_ptr& error) { calls += error ? 100 : 1; });
  CHECK_EQ(calls, 0);
  ticket.complete();
  ticket.fail(std::make_exception_ptr(Error(ErrorKind::kDevice, "late")));  // the first end counts
  CHECK_EQ(calls, 1);
  CHECK(ticket.wait());
  ticket.on_end([&](const std::exception_ptr&) { ++calls; });
  CHECK_EQ(calls, 2);
  CHECK(!Ticket::pending().wait(0));
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  held_copies_run_after_release_and_in_order();
  a_small_copy_that_nothing_holds_back_has_ended_at_the_return();
  small_copies_overtake_no_large_ones();
  nth_copy_fails_alone();
  bandwidth_follows_the_clock();
  a_rate_of_next_to_nothing_ends_no_copy();
  hold_time_does_not_count_as_transfer_time();
  destruction_ends_held_and_delayed_copies();
  pins_are_counted_and_fail_on_request();
  illegal_rates_are_refused();
  ticket_callbacks_run_once();
  return test::result();
}
