#include "transfer/transfer_queue.h"

#include <sys/wait.h>
#include <unistd.h>

#include <mutex>
#include <thread>
#include <vector>

#include "any_device.h"
#include "check.h"

namespace offload {
namespace {

struct Fixture {
  test::AnyDevice any;
  TransferQueue queue{any.device};
  char* host = any.host_memory.data();

  explicit Fixture(test::DeviceKind kind) : any(kind) {}
};

void lanes_are_independent(test::DeviceKind kind) {
  Fixture f(kind);
  char on_device = 'd', other = '.';
  f.host[8] = 'h';
  f.any.hold(Direction::kToHost);
  const Ticket down = f.queue.submit(Direction::kToHost, f.host, &on_device, 1, 0);
  f.queue.submit(Direction::kToDevice, &other, f.host + 8, 1, 0).wait();
  CHECK_EQ(other, 'h');
  CHECK(!down.done());
  f.any.release(Direction::kToHost);
  down.wait();
  CHECK_EQ(f.host[0], 'd');
}

void a_copy_waits_for_the_other_lane(test::DeviceKind kind) {
  Fixture f(kind);
  char first = '7', last = '.';
  f.any.hold(Direction::kToHost);
  const Ticket down = f.queue.submit(Direction::kToHost, f.host, &first, 1, 0);
  const CopySpan copy{&last, f.host, 1};
  const Ticket up = f.queue.submit_after(Direction::kToDevice, {&copy, 1}, down);
  CHECK(!up.done());
  f.any.release(Direction::kToHost);
  CHECK(f.queue.wait_on_stream(0, up));
  CHECK_EQ(last, '7');
}

void a_refused_copy_leaves_nothing_behind(test::DeviceKind kind) {
  Fixture f(kind);
  char copy = '.';
  f.host[0] = '3';
  const Ticket failed = Ticket::pending();
  failed.fail(std::make_exception_ptr(Error(ErrorKind::kDevice, "broken")));
  CHECK_THROWS(ErrorKind::kInvalidArgument, "null destination",
               f.queue.submit(Direction::kToDevice, nullptr, f.host, 1, 0, failed));
  const CopySpan half_null[] = {{&copy, f.host, 1}, {&copy, nullptr, 1}};
  CHECK_THROWS(ErrorKind::kInvalidArgument, "null source",
               f.queue.submit(Direction::kToDevice, half_null, 0, failed));
  CHECK(f.queue.submit(Direction::kToDevice, &copy, f.host, 1, 0).wait());
  CHECK_EQ(copy, '3');
  CHECK_EQ(f.queue.stats().to_device_count, 1u);
}

void stats_count_bytes_by_direction(test::DeviceKind kind) {
  Fixture f(kind);
  std::vector<char> on_device(24);
  f.queue.submit(Direction::kToHost, f.host, on_device.data(), 24, 0).wait();
  f.queue.submit(Direction::kToDevice, on_device.data(), f.host, 8, 0).wait();
  f.queue.submit(Direction::kToDevice, nullptr, nullptr, 0, 0).wait();
  const CopySpan batch[] = {{on_device.data(), f.host, 2}, {on_device.data() + 2, f.host, 3}};
  f.queue.submit(Direction::kToDevice, batch, 0).wait();
  const TransferStats stats = f.queue.stats();
  CHECK_EQ(stats.to_host_bytes, 24u);
  CHECK_EQ(stats.to_host_count, 1u);
  CHECK_EQ(stats.to_device_bytes, 13u);
  CHECK_EQ(stats.to_device_count, 4u);
}

// Writes down which submission each call belongs to, and lets other threads in between the calls.
class RecordingDevice final : public Device {
 public:
  const char* kind() const noexcept override { return "recording"; }
  std::unique_ptr<Stream> create_stream(const std::string&) override { return std::make_unique<Stream>(); }
  Ticket submit_copies(Stream&, Direction, std::span<const CopySpan> copies) override {
    record(reinterpret_cast<uintptr_t>(copies.front().destination));
    return {};
  }
  CopiesTogether copies_together() const noexcept override { return CopiesTogether::kInOneCall; }
  void wait_ticket(Stream&, const Ticket&) override { std::this_thread::yield(); }
  void wait_compute(Stream&, uintptr_t compute_stream) override {
    record(compute_stream);
    std::this_thread::yield();
  }
  bool compute_wait(uintptr_t, const Ticket&, int64_t) override { return true; }
  void pin(void*, size_t) override {}
  void unpin(void*, size_t) noexcept override {}

  std::vector<uintptr_t> calls;  // read when no thread submits

 private:
  void record(uintptr_t submission) {
    std::lock_guard lock(mutex_);
    calls.push_back(submission);
  }

  std::mutex mutex_;
};

void a_copy_and_its_waits_are_one_unit() {
  auto device = std::make_shared<RecordingDevice>();
  TransferQueue queue(device);
  constexpr uintptr_t kThreads = 4, kCopies = 200;
  {
    std::vector<std::jthread> threads;
    for (uintptr_t t = 0; t < kThreads; ++t) {
      threads.emplace_back([&queue, t] {
        for (uintptr_t i = 1; i <= kCopies; ++i) {
          const uintptr_t submission = t * kCopies + i;  // stands for the stream and for the destination
          queue.submit(Direction::kToDevice, reinterpret_cast<void*>(submission), &queue, 1, submission);
        }
      });
    }
  }
  CHECK_EQ(device->calls.size(), 2 * kThreads * kCopies);
  size_t torn = 0;
  for (size_t i = 0; i < device->calls.size(); i += 2) torn += device->calls[i] != device->calls[i + 1];
  CHECK_EQ(torn, 0u);
}

void destruction_finishes_the_lanes() {
  int value = 5, copy = 0;
  auto device = std::make_shared<HostDevice>();
  auto queue = std::make_unique<TransferQueue>(device);
  device->hold(Direction::kToDevice);
  const Ticket ticket = queue->submit(Direction::kToDevice, &copy, &value, sizeof(int), 0);
  queue.reset();
  CHECK(ticket.done());
  CHECK_EQ(copy, 5);
}

void an_end_finishes_the_lanes_for_good() {
  int value = 5, copy = 0;
  auto device = std::make_shared<HostDevice>();
  TransferQueue queue(device);
  device->hold(Direction::kToDevice);
  const Ticket held = queue.submit(Direction::kToDevice, &copy, &value, sizeof(int), 0);
  queue.end();
  CHECK(held.done());
  CHECK_EQ(copy, 5);
  queue.end();
  CHECK_THROWS(ErrorKind::kState, "has ended",
               queue.submit(Direction::kToHost, &copy, &value, sizeof(int), 0));
  CHECK_THROWS(ErrorKind::kState, "has ended", queue.wait_compute(Direction::kToDevice, 0));
  CHECK_EQ(queue.stats().to_device_count, 1u);
}

// A device that takes submissions for as long as it is told to.
class SlowDevice final : public Device {
 public:
  const char* kind() const noexcept override { return "slow"; }
  std::unique_ptr<Stream> create_stream(const std::string&) override { return std::make_unique<Stream>(); }
  Ticket submit_copies(Stream&, Direction, std::span<const CopySpan>) override {
    entered.complete();
    leaves.wait();
    return Ticket();
  }
  CopiesTogether copies_together() const noexcept override { return CopiesTogether::kInOneCall; }
  void wait_ticket(Stream&, const Ticket&) override {}
  void wait_compute(Stream&, uintptr_t) override {}
  bool compute_wait(uintptr_t, const Ticket& ticket, int64_t) override { return ticket.wait(); }
  void pin(void*, size_t) override {}
  void unpin(void*, size_t) noexcept override {}

  const Ticket entered = Ticket::pending(), leaves = Ticket::pending();
};

// The fork falls into a submission of another thread: in the child the lane stays locked for ever.
void a_child_forked_during_a_submission_is_refused_at_once() {
  auto device = std::make_shared<SlowDevice>();
  TransferQueue queue(device);
  int value = 5, copy = 0;
  const auto submit = [&] { queue.submit(Direction::kToHost, &copy, &value, sizeof(int), 0); };
  std::thread submitting(submit);
  device->entered.wait();
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    CHECK_THROWS(ErrorKind::kState, "parent process", submit());
    CHECK_THROWS(ErrorKind::kState, "parent process", queue.wait_compute(Direction::kToHost, 0));
    _exit(test::result());
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK_EQ(status, 0);
  device->leaves.complete();
  submitting.join();
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  for (const test::DeviceKind kind : test::kEveryDevice) {
    lanes_are_independent(kind);
    a_copy_waits_for_the_other_lane(kind);
    a_refused_copy_leaves_nothing_behind(kind);
    stats_count_bytes_by_direction(kind);
  }
  a_copy_and_its_waits_are_one_unit();
  destruction_finishes_the_lanes();
  an_end_finishes_the_lanes_for_good();
  a_child_forked_during_a_submission_is_refused_at_once();
  return test::result();
}
