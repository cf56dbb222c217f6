// What every device keeps, on each of them. What one of them alone does is in its own test.
#include "device/device.h"

#include <vector>

#include "any_device.h"
#include "check.h"

namespace offload {
namespace {

constexpr Direction kLane = Direction::kToDevice;

struct Fixture {
  test::AnyDevice any;
  Device& device;
  std::unique_ptr<Stream> stream;
  std::vector<char> destination = std::vector<char>(64, '.');

  explicit Fixture(test::DeviceKind kind)
      : any(kind), device(*any.device), stream(device.create_stream("to_device")) {
    for (size_t i = 0; i < any.host_memory.size(); ++i) any.host_memory[i] = static_cast<char>('0' + i / 64);
  }

  Ticket copy(size_t destination_offset, size_t source_offset, size_t bytes) {
    return device.submit_copy(*stream, kLane, destination.data() + destination_offset,
                              any.host_memory.data() + source_offset, bytes);
  }
};

void held_copies_run_after_release_and_in_order(test::DeviceKind kind) {
  Fixture f(kind);
  f.any.hold(kLane);
  const Ticket first = f.copy(0, 0, 8);
  const Ticket second = f.copy(4, 64, 8);  // over half of the first: any other order shows
  CHECK(!first.done());
  CHECK_EQ(f.destination[0], '.');
  f.any.release(kLane);
  second.wait();
  CHECK(first.done());
  CHECK_EQ(std::string(f.destination.data(), 12), "000011111111");
}

void wait_ticket_orders_and_fails_only_the_next_copy(test::DeviceKind kind) {
  Fixture f(kind);
  const Ticket gate = Ticket::pending();
  f.device.wait_ticket(*f.stream, gate);
  const Ticket next = f.copy(0, 0, 8);
  const Ticket later = f.copy(8, 0, 8);
  CHECK(!next.done());
  CHECK(!later.done());
  gate.fail(std::make_exception_ptr(Error(ErrorKind::kStorage, "the disk is gone")));
  CHECK_THROWS(ErrorKind::kStorage, "the disk is gone", next.wait());
  CHECK(later.wait());
  CHECK_EQ(f.destination[0], '.');
  CHECK_EQ(f.destination[8], '0');
}

void a_wait_for_a_ticket_that_failed_fails_the_next_copy(test::DeviceKind kind) {
  Fixture f(kind);
  const Ticket failed = Ticket::pending();
  failed.fail(std::make_exception_ptr(Error(ErrorKind::kStorage, "the disk is gone")));
  f.device.wait_ticket(*f.stream, failed);
  const Ticket next = f.copy(0, 0, 8);
  CHECK(f.copy(8, 0, 8).wait());
  CHECK(next.done());  // tickets of a stream end in order
  CHECK_THROWS(ErrorKind::kStorage, "the disk is gone", next.wait());
  CHECK_EQ(f.destination[0], '.');
}

void a_copy_of_one_stream_waits_for_another_stream(test::DeviceKind kind) {
  Fixture f(kind);
  std::unique_ptr<Stream> to_host = f.device.create_stream("to_host");
  char value = 'v';
  f.any.hold(Direction::kToHost);
  const Ticket down = f.device.submit_copy(*to_host, Direction::kToHost, f.any.host_memory.data(), &value, 1);
  f.device.wait_ticket(*f.stream, down);
  const Ticket up = f.copy(0, 0, 1);
  CHECK(!up.done());
  f.any.release(Direction::kToHost);
  CHECK(up.wait());
  CHECK_EQ(f.destination[0], 'v');
}

void compute_waits_for_a_copy_and_sees_its_error(test::DeviceKind kind) {
  Fixture f(kind);
  CHECK(f.device.compute_wait(0, Ticket()));
  CHECK(!f.device.compute_wait(0, Ticket::pending(), 0));
  const Ticket gate = Ticket::pending();
  f.device.wait_ticket(*f.stream, gate);
  const Ticket ticket = f.copy(0, 0, 8);
  CHECK(!f.device.compute_wait(0, ticket, 0));
  gate.complete();
  CHECK(f.device.compute_wait(0, ticket));
  CHECK_EQ(f.destination[7], '0');
  gate.fail(std::make_exception_ptr(Error(ErrorKind::kStorage, "late")));  // the first end counts
  const Ticket failed = Ticket::pending();
  f.device.wait_ticket(*f.stream, failed);
  const Ticket behind = f.copy(8, 0, 8);
  failed.fail(std::make_exception_ptr(Error(ErrorKind::kStorage, "the disk is gone")));
  CHECK_THROWS(ErrorKind::kStorage, "the disk is gone", f.device.compute_wait(0, behind));
}

void copies_of_one_submission_end_together(test::DeviceKind kind) {
  Fixture f(kind);
  char* const host = f.any.host_memory.data();
  const CopySpan batch[] = {
      {&f.destination[8], host, 4}, {&f.destination[0], host + 64, 4}, {nullptr, nullptr, 0}};
  f.any.hold(kLane);
  const Ticket ticket = f.device.submit_copies(*f.stream, kLane, batch);
  const Ticket behind = f.copy(2, 128, 2);
  CHECK(!ticket.done());
  f.any.release(kLane);
  CHECK(behind.wait());
  CHECK(ticket.done());
  CHECK_EQ(std::string(f.destination.data(), 13), "1122....0000.");
  CHECK(f.device.submit_copies(*f.stream, kLane, {}).wait());
}

void destruction_cancels_a_wait_that_cannot_end(test::DeviceKind kind) {
  Fixture f(kind);
  f.device.wait_ticket(*f.stream, Ticket::pending());
  const Ticket ticket = f.copy(0, 0, 8);
  const Ticket later = f.copy(8, 0, 8);
  f.stream.reset();
  CHECK_THROWS(ErrorKind::kDevice, "destroyed before the work it waits for ended", ticket.wait());
  CHECK(later.wait());
  CHECK_EQ(f.destination[0], '.');
  CHECK_EQ(f.destination[8], '0');
}

void a_copy_of_nothing_is_done_in_its_turn(test::DeviceKind kind) {
  Fixture f(kind);
  const Ticket before = f.copy(0, 0, 8);
  CHECK(f.device.submit_copy(*f.stream, kLane, nullptr, nullptr, 0).wait());
  CHECK(before.done());
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  for (const test::DeviceKind kind : test::kEveryDevice) {
    held_copies_run_after_release_and_in_order(kind);
    wait_ticket_orders_and_fails_only_the_next_copy(kind);
    a_wait_for_a_ticket_that_failed_fails_the_next_copy(kind);
    a_copy_of_one_stream_waits_for_another_stream(kind);
    compute_waits_for_a_copy_and_sees_its_error(kind);
    copies_of_one_submission_end_together(kind);
    destruction_cancels_a_wait_that_cannot_end(kind);
    a_copy_of_nothing_is_done_in_its_turn(kind);
  }
  return test::result();
}
