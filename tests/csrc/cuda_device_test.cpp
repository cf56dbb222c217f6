// What CudaDevice alone does, over the driver double. What every device keeps is in device_test.cpp.
#include "device/cuda_device.h"

#include <thread>
#include <vector>

#include "any_device.h"
#include "check.h"
#include "device/cuda_stream.h"

namespace offload {
namespace {

constexpr int64_t kHangNs = 60'000'000'000;  // far more than anything here takes

std::exception_ptr broken() { return std::make_exception_ptr(Error(ErrorKind::kStorage, "broken")); }

// A compute stream that runs by itself, as torch's side streams do. Its work is copies, so that it can be
// held.
class Compute {
 public:
  Compute()
      : driver_(CudaDriver::load(DRIVER_DOUBLE_PATH)),
        context_(std::make_shared<CudaPrimaryContext>(driver_, 0)) {
    CudaPrimaryContext::Current current(*context_);
    driver_.check(driver_.StreamCreateWithPriority(&handle_, 1, 0), "a compute stream");
  }

  ~Compute() {
    CudaPrimaryContext::Current current(*context_);
    driver_.StreamDestroy(handle_);
  }

  uintptr_t stream() const { return reinterpret_cast<uintptr_t>(handle_); }

  void run(Direction direction, void* destination, const void* source) {
    CudaPrimaryContext::Current current(*context_);
    driver_.check(
        direction == Direction::kToHost
            ? driver_.MemcpyDtoHAsync(destination, reinterpret_cast<CudaAddress>(source), 1, handle_)
            : driver_.MemcpyHtoDAsync(reinterpret_cast<CudaAddress>(destination), source, 1, handle_),
        "compute");
  }

  void wait() {
    CudaPrimaryContext::Current current(*context_);
    const auto event = context_->acquire_event();
    event->record(handle_);
    driver_.check(event->synchronize(), "cuEventSynchronize");
  }

 private:
  const CudaDriver& driver_;
  std::shared_ptr<CudaPrimaryContext> context_;
  CudaStreamHandle handle_ = nullptr;
};

struct Fixture {
  test::AnyDevice any{test::DeviceKind::kCudaPinned};
  CudaDevice& device = static_cast<CudaDevice&>(*any.device);
  std::unique_ptr<Stream> to_host = device.create_stream("to_host");
  std::unique_ptr<Stream> to_device = device.create_stream("to_device");
  char* host = any.host_memory.data();  // registered
  std::vector<char> on_device = std::vector<char>(256, 'd');

  Ticket up(size_t offset, size_t bytes) {
    return device.submit_copy(*to_device, Direction::kToDevice, on_device.data() + offset, host + offset,
                              bytes);
  }
  Ticket down(size_t offset, size_t bytes) {
    return device.submit_copy(*to_host, Direction::kToHost, host + offset, on_device.data() + offset, bytes);
  }
};

// --- streams and compute ----------------------------------------------------------------------------------

void a_copy_waits_for_the_compute_stream() {
  Fixture f;
  Compute compute;
  char before = '.';
  f.any.hold(Direction::kToDevice);
  compute.run(Direction::kToDevice, &f.on_device[0], f.host);  // a kernel that writes what the copy reads
  f.device.wait_compute(*f.to_host, compute.stream());
  const Ticket ticket = f.down(0, 1);
  f.host[1] = before;
  CHECK(!ticket.done());
  f.any.release(Direction::kToDevice);
  CHECK(ticket.wait(kHangNs));
  CHECK_EQ(f.host[0], '.');
}

void a_deferred_copy_waits_for_compute_as_it_was_at_the_call() {
  Fixture f;
  Compute compute;
  const Ticket gate = Ticket::pending();
  f.device.wait_ticket(*f.to_device, gate);
  f.device.wait_compute(*f.to_device, compute.stream());
  const Ticket ticket = f.up(0, 1);
  f.any.hold(Direction::kToHost);
  compute.run(Direction::kToHost, f.host + 8,
              &f.on_device[8]);  // after the call: must not hold the copy back
  gate.complete();
  CHECK(ticket.wait(kHangNs));
  f.any.release(Direction::kToHost);
  compute.wait();
}

void a_failed_ticket_does_not_lift_the_wait_for_compute() {
  Fixture f;
  Compute compute;
  f.any.hold(Direction::kToHost);
  compute.run(Direction::kToHost, f.host, &f.on_device[0]);
  const Ticket failed = Ticket::pending();
  failed.fail(broken());
  f.device.wait_ticket(*f.to_device, failed);
  f.device.wait_compute(*f.to_device, compute.stream());
  const Ticket first = f.up(8, 1), second = f.up(0, 1);
  CHECK_THROWS(ErrorKind::kStorage, "broken", first.wait(kHangNs));
  CHECK(!second.done());
  f.any.release(Direction::kToHost);
  CHECK(second.wait(kHangNs));
  CHECK_EQ(f.on_device[0], 'd');  // what compute had written before
}

void compute_waits_for_an_issued_copy_without_the_host() {
  Fixture f;
  Compute compute;
  f.host[0] = 'n';
  f.any.hold(Direction::kToDevice);
  const Ticket ticket = f.up(0, 1);
  CHECK(f.device.compute_wait(compute.stream(), ticket));
  CHECK(!ticket.done());
  compute.run(Direction::kToHost, f.host + 1, &f.on_device[0]);
  CHECK_EQ(f.host[1], '.');
  f.any.release(Direction::kToDevice);
  compute.wait();
  CHECK_EQ(f.host[1], 'n');
}

void compute_wait_for_a_deferred_copy_blocks_until_it_is_issued() {
  Fixture f;
  Compute compute;
  const Ticket gate = Ticket::pending();
  f.device.wait_ticket(*f.to_device, gate);
  f.any.hold(Direction::kToDevice);
  const Ticket ticket = f.up(0, 1);
  CHECK(!f.device.compute_wait(compute.stream(), ticket, 0));
  std::jthread opener([&] { gate.complete(); });
  CHECK(f.device.compute_wait(compute.stream(), ticket, kHangNs));
  CHECK(!ticket.done());
  f.any.release(Direction::kToDevice);
  CHECK(ticket.wait(kHangNs));
  compute.wait();
}

// The issuer waits for the host's ticket while the ender sleeps in the driver: neither keeps the other.
void a_deferred_copy_is_issued_while_the_copy_before_it_runs() {
  Fixture f;
  Compute compute;
  f.any.hold(Direction::kToDevice);
  const Ticket running = f.up(0, 1);
  const Ticket gate = Ticket::pending();
  f.device.wait_ticket(*f.to_device, gate);
  const Ticket deferred = f.up(1, 1);
  gate.complete();
  CHECK(f.device.compute_wait(compute.stream(), deferred, kHangNs));
  CHECK(!running.done());
  f.any.release(Direction::kToDevice);
  CHECK(deferred.wait(kHangNs));
}

void a_copy_behind_an_issued_copy_is_issued_at_once() {
  Fixture f;
  Compute compute;
  f.any.hold(Direction::kToHost);
  const Ticket first = f.down(0, 1);
  f.device.wait_ticket(*f.to_device, first);
  const Ticket second = f.up(0, 1);
  CHECK(f.device.compute_wait(compute.stream(), second, 0));
  CHECK(!first.done() && !second.done());
  f.any.release(Direction::kToHost);
  CHECK(second.wait(kHangNs));
}

void a_stream_waits_for_a_deferred_copy_of_another() {
  Fixture f;
  f.host[0] = 'n';
  const Ticket gate = Ticket::pending();
  f.device.wait_ticket(*f.to_device, gate);
  const Ticket first = f.up(0, 1);
  f.device.wait_ticket(*f.to_host, first);
  const Ticket second = f.device.submit_copy(*f.to_host, Direction::kToHost, f.host + 1, &f.on_device[0], 1);
  CHECK(!second.done());
  gate.complete();
  CHECK(second.wait(kHangNs));
  CHECK_EQ(f.host[1], 'n');
  const Ticket failed = Ticket::pending();
  f.device.wait_ticket(*f.to_device, failed);
  f.device.wait_ticket(*f.to_host, f.up(0, 1));
  const Ticket third = f.down(2, 1);
  failed.fail(broken());
  CHECK_THROWS(ErrorKind::kStorage, "broken", third.wait(kHangNs));
}

// Of a model that is none of ours. The first lane's threads are there before it, the other's come during it.
void copies_go_on_while_a_thread_captures_a_graph() {
  Fixture f;
  CHECK(f.up(0, 8).wait(kHangNs));
  double_set_capturing(1);
  std::vector<char> pageable(8, 'p');
  CHECK(f.up(0, 8).wait(kHangNs));
  CHECK(f.down(64, 8).wait(kHangNs));
  CHECK(f.device.submit_copy(*f.to_host, Direction::kToHost, pageable.data(), &f.on_device[64], 8)
            .wait(kHangNs));
  CHECK_EQ(pageable[7], 'd');
  CHECK_EQ(std::string(double_first_misuse()), "");
  double_set_capturing(0);
}

void events_return_when_copies_end_and_tickets_stay() {
  Fixture f;
  std::vector<Ticket> tickets;
  for (int i = 0; i < 50; ++i) {
    f.device.wait_compute(*f.to_device, 0);
    tickets.push_back(f.up(0, 8));
    tickets.back().wait();
  }
  // One for the position and one for the copy; another where the last copy's is on its way back.
  CHECK(double_live("events") <= 3);
}

// --- host memory ------------------------------------------------------------------------------------------

void ranges_cut_a_copy_at_every_edge() {
  PinnedRanges ranges;
  using Parts = std::vector<size_t>;
  CHECK(ranges.cut(100, 10).parts_bytes == Parts{10} && !ranges.cut(100, 10).pinned);
  CHECK(ranges.cut(100, 0).parts_bytes.empty() && ranges.cut(100, 0).pinned);
  ranges.add(100, 50);
  ranges.add(150, 50);
  ranges.add(300, 10);
  CHECK_EQ(ranges.total_bytes(), 110u);
  CHECK(ranges.cut(100, 50).parts_bytes == Parts{50} && ranges.cut(100, 50).pinned);
  CHECK((ranges.cut(120, 60).parts_bytes == Parts{30, 30}) && ranges.cut(120, 60).pinned);
  CHECK((ranges.cut(90, 20).parts_bytes == Parts{10, 10}) && !ranges.cut(90, 20).pinned);
  CHECK((ranges.cut(190, 130).parts_bytes == Parts{10, 100, 10, 10}) && !ranges.cut(190, 130).pinned);
  CHECK(ranges.cut(200, 100).parts_bytes == Parts{100} && !ranges.cut(200, 100).pinned);
  ranges.remove(150);
  ranges.remove(151);
  CHECK_EQ(ranges.total_bytes(), 60u);
  CHECK(!ranges.cut(150, 50).pinned);
}

void pageable_copies_are_right_and_counted() {
  Fixture f;
  std::vector<char> pageable(64, 'p');
  CHECK(f.up(0, 64).wait());
  CHECK_EQ(f.device.facts().pageable_copy_count, 0u);
  const Ticket up =
      f.device.submit_copy(*f.to_device, Direction::kToDevice, f.on_device.data(), pageable.data(), 64);
  CHECK(up.wait(kHangNs));
  CHECK_EQ(f.on_device[63], 'p');
  CHECK_EQ(f.device.facts().pageable_copy_count, 1u);
  // Held: the driver blocks whoever makes this call, and that is not the caller.
  f.any.hold(Direction::kToHost);
  const Ticket down =
      f.device.submit_copy(*f.to_host, Direction::kToHost, pageable.data(), f.on_device.data() + 100, 64);
  const Ticket behind = f.down(0, 8);
  CHECK(!behind.done());
  f.any.release(Direction::kToHost);
  CHECK(behind.wait(kHangNs));
  CHECK(down.done());
  CHECK_EQ(pageable[63], 'd');
  CHECK_EQ(f.device.facts().pageable_copy_count, 2u);
}

void a_pageable_source_is_read_after_the_copy_that_writes_it() {
  Fixture f;
  char pageable = '.', last = '.';
  f.any.hold(Direction::kToHost);
  const Ticket down = f.device.submit_copy(*f.to_host, Direction::kToHost, &pageable, &f.on_device[0], 1);
  f.device.wait_ticket(*f.to_device, down);
  const Ticket up = f.device.submit_copy(*f.to_device, Direction::kToDevice, &last, &pageable, 1);
  f.any.release(Direction::kToHost);
  CHECK(up.wait(kHangNs));
  CHECK_EQ(last, 'd');
}

void a_copy_across_registrations_is_cut() {
  Fixture f;
  std::vector<char> memory(96, 'm');
  f.device.pin(memory.data(), 32);
  f.device.pin(memory.data() + 32, 32);
  CHECK(f.device.submit_copy(*f.to_device, Direction::kToDevice, f.on_device.data(), memory.data() + 8, 50)
            .wait(kHangNs));
  CHECK_EQ(f.device.facts().pageable_copy_count, 0u);
  CHECK(f.device.submit_copy(*f.to_device, Direction::kToDevice, f.on_device.data(), memory.data() + 8, 88)
            .wait(kHangNs));
  CHECK_EQ(f.device.facts().pageable_copy_count, 1u);
  CHECK_EQ(std::string(f.on_device.data(), 88), std::string(88, 'm'));
  CHECK_EQ(f.device.pinned_bytes(), 256u + 64u);
  f.device.unpin(memory.data(), 32);
  CHECK_EQ(double_live("registered_bytes"), 256u + 32u);
}  // the device gives the other one back

void a_refused_registration_changes_nothing() {
  Fixture f;
  std::vector<char> memory(64, 'm');
  for (const int code : {2, 800, 801}) {
    double_fail("cuMemHostRegister_v2", 1, code, 0);
    CHECK_THROWS(ErrorKind::kDevice, "ulimit -l", f.device.pin(memory.data(), 64));
  }
  double_fail("cuMemHostRegister_v2", 1, 712, 0);
  CHECK_THROWS(ErrorKind::kDevice, "Another library has registered", f.device.pin(memory.data(), 64));
  double_fail("cuMemHostRegister_v2", 1, 2, 0);
  CHECK_THROWS(ErrorKind::kDevice, "pinning 64 bytes", f.device.pin(memory.data(), 64));
  CHECK_EQ(f.device.pinned_bytes(), 256u);
  CHECK(f.device.submit_copy(*f.to_device, Direction::kToDevice, f.on_device.data(), memory.data(), 64)
            .wait(kHangNs));
  CHECK_EQ(f.on_device[63], 'm');
}

void a_device_that_registers_no_memory_copies_it_all_the_same() {
  double_reset();
  double_set_attribute(99, 0);  // CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED
  CudaDeviceOptions options;
  options.driver_path = DRIVER_DOUBLE_PATH;
  CudaDevice device(options);
  CHECK(!device.facts().can_pin);
  std::vector<char> memory(64, 'm'), on_device(64);
  CHECK_THROWS(ErrorKind::kDevice, "does not register host memory", device.pin(memory.data(), 64));
  CHECK_EQ(device.pinned_bytes(), 0u);
  CHECK_EQ(double_calls("cuMemHostRegister_v2"), 0u);
  const auto stream = device.create_stream("to_device");
  CHECK(device.submit_copy(*stream, Direction::kToDevice, on_device.data(), memory.data(), 64).wait(kHangNs));
  CHECK(on_device == memory);
}

// --- faults -----------------------------------------------------------------------------------------------

void a_copy_that_fails_while_it_runs_loses_the_context() {
  Fixture f;
  f.any.hold(Direction::kToDevice);
  double_fail_copy("to_device", 2, 700);
  const Ticket first = f.up(0, 8), second = f.up(8, 8), third = f.up(16, 8);
  f.device.wait_ticket(*f.to_host, second);
  const Ticket behind = f.down(0, 8);
  f.any.release(Direction::kToDevice);
  CHECK_THROWS(ErrorKind::kDevice, "restart the process", second.wait(kHangNs));
  CHECK_THROWS(ErrorKind::kDevice, "code 700", third.wait(kHangNs));
  CHECK_THROWS(ErrorKind::kDevice, "code 700", behind.wait(kHangNs));
  CHECK_THROWS(ErrorKind::kDevice, "code 700", f.up(0, 8).wait(kHangNs));
  CHECK_THROWS(ErrorKind::kDevice, "code 700", f.device.wait_compute(*f.to_device, 0));
  CHECK_THROWS(ErrorKind::kDevice, "code 700", f.device.create_stream("more"));
  CHECK(first.wait_ended(kHangNs));
}

void a_refused_wait_is_owed_to_the_next_copy() {
  Fixture f;
  Compute compute;
  f.any.hold(Direction::kToHost);
  compute.run(Direction::kToHost, f.host, &f.on_device[0]);
  f.device.wait_compute(*f.to_device, compute.stream());
  double_fail("cuStreamWaitEvent", 1, 999, 0);
  const Ticket first = f.up(8, 1);
  CHECK_THROWS(ErrorKind::kDevice, "cuStreamWaitEvent failed", first.wait(kHangNs));
  const Ticket second = f.up(0, 1);
  CHECK(!second.done());
  f.any.release(Direction::kToHost);
  CHECK(second.wait(kHangNs));
  CHECK_EQ(f.on_device[0], 'd');
}

// The ticket of a copy ends after its bytes, also when the driver refused to say so at first: its memory is
// free at once (AddressSanitizer sees a copy that still runs).
void no_ticket_ends_before_its_bytes() {
  for (const char* entry : {"cuEventRecord", "cuEventSynchronize", "cuCtxPushCurrent_v2"}) {
    Fixture f;
    auto memory = std::make_unique<std::vector<char>>(64, '.');
    f.device.pin(memory->data(), 64);
    f.any.hold(Direction::kToHost);
    // The push of the submission itself works; the one before the synchronisation does not.
    double_fail(entry, std::string(entry) == "cuCtxPushCurrent_v2" ? 2 : 1, 999, 0);
    const Ticket ticket =
        f.device.submit_copy(*f.to_host, Direction::kToHost, memory->data(), f.on_device.data(), 64);
    std::jthread releaser([&] { f.any.release(Direction::kToHost); });
    CHECK_THROWS(ErrorKind::kDevice, "code 999", ticket.wait(kHangNs));
    CHECK_EQ(double_live("pending_copies"), 0u);
    CHECK_EQ((*memory)[63], 'd');
    f.device.unpin(memory->data(), 64);
    memory.reset();
  }
}

// One step of a training loop in small: everything that the device does, in the order of an engine.
void use_everything(CudaDevice& device, std::vector<char>& host, std::vector<Ticket>& tickets) {
  std::vector<char> pageable(16, 'p');
  static char on_device[64];
  device.facts();
  device.pin(host.data(), host.size());
  auto to_host = device.create_stream("to_host");
  auto to_device = device.create_stream("to_device");
  const auto copy = [&](Stream& stream, Direction direction, void* destination, const void* source) {
    tickets.push_back(device.submit_copy(stream, direction, destination, source, 16));
    return tickets.back();
  };
  device.wait_compute(*to_host, 0);
  const Ticket down = copy(*to_host, Direction::kToHost, host.data(), on_device);
  device.wait_ticket(*to_device, down);
  const Ticket up = copy(*to_device, Direction::kToDevice, on_device + 32, host.data());
  const Ticket gate = Ticket::pending();
  device.wait_ticket(*to_device, gate);
  copy(*to_device, Direction::kToDevice, on_device + 48, host.data() + 16);
  copy(*to_host, Direction::kToHost, pageable.data(), on_device);
  const CopySpan batch[] = {{on_device + 16, host.data(), 4}, {on_device + 24, host.data() + 8, 4}};
  tickets.push_back(device.submit_copies(*to_device, Direction::kToDevice, batch));
  gate.complete();
  for (const Ticket& ticket : std::vector<Ticket>(tickets)) device.compute_wait(0, ticket, kHangNs);
  for (const Ticket& ticket : tickets) ticket.wait_ended(kHangNs);
  to_host.reset();
  to_device.reset();
  device.unpin(host.data(), host.size());
}

// The nth call of every entry fails: a typed error or none, no hang, nothing left alive but what the failing
// call should have given back, and the next device works.
void every_entry_may_fail_at_every_call() {
  struct Case {
    const char* entry;
    bool gives_back;  // or is needed to: then what it refused to give back stays
  };
  const Case cases[] = {
      {"cuDeviceGetCount", false},
      {"cuDeviceGet", false},
      {"cuDeviceGetName", false},
      {"cuDeviceGetUuid_v2", false},
      {"cuDeviceGetAttribute", false},
      {"cuDeviceTotalMem_v2", false},
      {"cuDevicePrimaryCtxRetain", false},
      {"cuDevicePrimaryCtxRelease_v2", true},
      {"cuCtxPushCurrent_v2", true},
      {"cuCtxGetStreamPriorityRange", false},
      {"cuThreadExchangeStreamCaptureMode", false},
      {"cuMemGetInfo_v2", false},
      {"cuMemHostRegister_v2", false},
      {"cuMemHostUnregister", true},
      {"cuStreamCreateWithPriority", false},
      {"cuStreamDestroy_v2", true},
      {"cuStreamWaitEvent", false},
      {"cuEventCreate", false},
      {"cuEventRecord", false},
      {"cuEventSynchronize", false},
      {"cuEventDestroy_v2", true},
      {"cuMemcpyHtoDAsync_v2", false},
      {"cuMemcpyDtoHAsync_v2", false},
      {"cuMemcpyBatchAsync", false},
  };
  const char* const kinds[] = {"contexts", "streams", "events", "registrations"};
  CudaDeviceOptions options;
  options.driver_path = DRIVER_DOUBLE_PATH;
  size_t fault_count = 0;
  for (const Case& fault : cases) {
    // A driver that never says whether a copy has ended has lost the context; then none runs any more. Here
    // they would run on, into memory that is free.
    const std::string entry = fault.entry;
    const bool may_last =
        entry != "cuEventSynchronize" && entry != "cuEventRecord" && entry != "cuCtxPushCurrent_v2";
    for (int lasting = 0; lasting <= (may_last ? 1 : 0); ++lasting) {
      for (size_t nth = 1;; ++nth) {
        double_reset();
        size_t before[4];
        for (size_t i = 0; i < 4; ++i) before[i] = double_live(kinds[i]);
        std::vector<char> host(32, 'h');
        std::vector<Ticket> tickets;
        double_fail(fault.entry, nth, 719, lasting);
        try {
          CudaDevice device(options);
          use_everything(device, host, tickets);
        } catch (const Error& error) {
          CHECK(error.kind() == ErrorKind::kDevice);
          CHECK(std::string(error.what()).find("code 719") != std::string::npos);
        }
        double_fail(fault.entry, 0, 0, 0);
        if (double_live("registrations") > before[3]) {
          CudaPrimaryContext context(CudaDriver::load(DRIVER_DOUBLE_PATH), 0);
          CudaPrimaryContext::Current current(context);
          CHECK(fault.gives_back);
          context.driver().MemHostUnregister(host.data());  // the next run may get the same memory
        }
        for (const Ticket& ticket : tickets) CHECK(ticket.done());
        const bool reached = double_calls(fault.entry) >= nth;
        fault_count += reached;
        CHECK_EQ(double_live("pushed_contexts"), 0u);
        CHECK_EQ(double_live("pending_copies"), 0u);
        if (double_misuses() != 0) test::report_failure(__FILE__, __LINE__, double_first_misuse());
        for (size_t i = 0; i < 4; ++i) {
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
}

// As at the exit of a process, where the driver goes first.
void after_the_driver_shut_down_nothing_hangs() {
  double_reset();
  CudaDeviceOptions options;
  options.driver_path = DRIVER_DOUBLE_PATH;
  static char host[64], on_device[64];  // stays registered
  Ticket ticket;
  {
    CudaDevice device(options);
    device.pin(host, 64);
    auto stream = device.create_stream("to_device");
    device.submit_copy(*stream, Direction::kToDevice, on_device, host, 8).wait();
#define FAIL_ENTRY(name, symbol, version, parameters) double_fail(#symbol, 1, 4, 1);
    OFFLOAD_CUDA_ENTRIES(FAIL_ENTRY)
#undef FAIL_ENTRY
    ticket = device.submit_copy(*stream, Direction::kToDevice, on_device, host, 8);
    device.wait_ticket(*stream, ticket);
    CHECK_THROWS(ErrorKind::kDevice, "The process is exiting", device.wait_compute(*stream, 0));
  }
  CHECK_THROWS(ErrorKind::kDevice, "The process is exiting", ticket.wait(kHangNs));
}

void a_hung_device_is_given_up() {
  double_reset();
  CudaDeviceOptions options;
  options.driver_path = DRIVER_DOUBLE_PATH;
  options.drain_ns = 1'000'000;
  const size_t contexts = double_live("contexts");
  auto device = std::make_unique<CudaDevice>(options);
  std::vector<char> host(64, 'h'), on_device(64, 'd'), pageable(64, 'p');
  device->pin(host.data(), 64);
  auto stream = device->create_stream("to_host");
  double_hold("to_host");
  const Ticket issued = device->submit_copy(*stream, Direction::kToHost, host.data(), on_device.data(), 8);
  const Ticket deferred =
      device->submit_copy(*stream, Direction::kToHost, pageable.data(), on_device.data(), 8);
  stream.reset();
  CHECK_THROWS(ErrorKind::kDevice, "does not answer", issued.wait(kHangNs));
  CHECK_THROWS(ErrorKind::kDevice, "does not answer", deferred.wait(kHangNs));
  CHECK(double_live("contexts") > contexts);
  // The threads that were left in the driver end when it answers, and give back all but the stream itself.
  double_release("to_host");
  while (double_live("pending_copies") > 0) std::this_thread::yield();
  device.reset();
  while (double_live("contexts") > contexts) std::this_thread::yield();
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  a_copy_waits_for_the_compute_stream();
  a_deferred_copy_waits_for_compute_as_it_was_at_the_call();
  a_failed_ticket_does_not_lift_the_wait_for_compute();
  compute_waits_for_an_issued_copy_without_the_host();
  compute_wait_for_a_deferred_copy_blocks_until_it_is_issued();
  a_deferred_copy_is_issued_while_the_copy_before_it_runs();
  a_copy_behind_an_issued_copy_is_issued_at_once();
  a_stream_waits_for_a_deferred_copy_of_another();
  copies_go_on_while_a_thread_captures_a_graph();
  events_return_when_copies_end_and_tickets_stay();
  ranges_cut_a_copy_at_every_edge();
  pageable_copies_are_right_and_counted();
  a_pageable_source_is_read_after_the_copy_that_writes_it();
  a_copy_across_registrations_is_cut();
  a_refused_registration_changes_nothing();
  a_device_that_registers_no_memory_copies_it_all_the_same();
  a_copy_that_fails_while_it_runs_loses_the_context();
  a_refused_wait_is_owed_to_the_next_copy();
  no_ticket_ends_before_its_bytes();
  every_entry_may_fail_at_every_call();
  after_the_driver_shut_down_nothing_hangs();
  a_hung_device_is_given_up();
  return test::result();
}
