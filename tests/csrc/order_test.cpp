// The double finds accesses that nothing orders, and takes every order that CUDA gives for one.
#include "driver_double/order.h"

#include <string>
#include <vector>

#include "check.h"
#include "device/cuda_driver.h"
#include "driver_double/driver_double.h"

using namespace offload;

namespace {

enum Use { kReads, kWrites, kAllocates, kFrees };

// One that torch computes on, beside the default one: as theirs, it is there until the process ends.
uintptr_t side() {
  static const uintptr_t stream = double_compute_stream();
  return stream;
}

CudaStreamHandle handle_of(uintptr_t stream) { return reinterpret_cast<CudaStreamHandle>(stream); }

// Two streams of copies, an event, registered memory of the host and memory of a device, all watched.
struct Watched {
  const CudaDriver& driver = CudaDriver::load(DRIVER_DOUBLE_PATH);
  CudaContext context = nullptr;
  CudaStreamHandle stream = nullptr, other = nullptr;
  CudaEventHandle event = nullptr;
  std::vector<char> host = std::vector<char>(4096, 1);
  std::vector<char> device = std::vector<char>(4096, 2);

  Watched() {
    double_reset();
    CHECK_EQ(driver.DevicePrimaryCtxRetain(&context, 0), 0);
    CHECK_EQ(driver.CtxPushCurrent(context), 0);
    for (CudaStreamHandle* made : {&stream, &other}) CHECK_EQ(driver.StreamCreateWithPriority(made, 1, 0), 0);
    CHECK_EQ(driver.EventCreate(&event, 2), 0);
    CHECK_EQ(driver.MemHostRegister(host.data(), host.size(), 1), 0);
    double_watch(1);
  }

  ~Watched() {
    CHECK_EQ(driver.CtxSynchronize(), 0);
    driver.MemHostUnregister(host.data());
    driver.EventDestroy(event);
    for (const CudaStreamHandle made : {stream, other}) driver.StreamDestroy(made);
    driver.CtxPopCurrent(&context);
    driver.DevicePrimaryCtxRelease(0);
    CHECK_EQ(double_misuses(), 0u);
    double_reset();
  }

  void compute(Use use, size_t begin = 0, size_t bytes = 1024, uintptr_t on = 0) {
    const double_span span{reinterpret_cast<uintptr_t>(device.data()) + begin, bytes, use};
    double_compute(on, "an operator", &span, 1);
  }
  void compute_aside(Use use, size_t begin = 0) { compute(use, begin, 1024, side()); }
  // Of a block of `of` that was recorded on others.
  void free(uintptr_t of, const std::vector<uintptr_t>& used_on) {
    const double_span span{reinterpret_cast<uintptr_t>(device.data()), 1024, kFrees};
    double_free(of, used_on.data(), used_on.size(), "an owner", &span);
  }
  void to_host(CudaStreamHandle on, size_t begin = 0, size_t bytes = 1024) {
    const auto source = reinterpret_cast<CudaAddress>(device.data() + begin);
    CHECK_EQ(driver.MemcpyDtoHAsync(host.data() + begin, source, bytes, on), 0);
  }
  void to_device(CudaStreamHandle on, size_t begin = 0, size_t bytes = 1024) {
    const auto destination = reinterpret_cast<CudaAddress>(device.data() + begin);
    CHECK_EQ(driver.MemcpyHtoDAsync(destination, host.data() + begin, bytes, on), 0);
  }
  // Later work of `later` comes behind what `earlier` has; null is the default stream.
  void order(CudaStreamHandle later, CudaStreamHandle earlier) {
    CHECK_EQ(driver.EventRecord(event, earlier), 0);
    CHECK_EQ(driver.StreamWaitEvent(later, event, 0), 0);
  }
};

void test_a_copy_waits_for_what_made_its_bytes() {
  {
    Watched all;
    all.compute(kWrites);
    all.to_host(all.stream);
    CHECK_EQ(double_races(), 1u);
    const std::string text = double_race_texts();
    CHECK(text.find("a copy to_host on stream ") == 0);
    CHECK(text.find(" reads 1024 bytes ") != std::string::npos);
    CHECK(text.find(" while an operator on the default stream writes 1024 bytes ") != std::string::npos);
  }
  Watched all;
  all.compute(kWrites);
  all.order(all.stream, nullptr);
  all.to_host(all.stream);
  CHECK_EQ(double_races(), 0u);
}

void test_compute_waits_for_a_copy() {
  {
    Watched all;
    all.to_device(all.stream);
    all.compute(kReads);
    CHECK_EQ(double_races(), 1u);
  }
  Watched all;
  all.to_device(all.stream);
  all.order(nullptr, all.stream);
  all.compute(kReads);
  CHECK_EQ(double_races(), 0u);
}

void test_a_wait_is_for_what_was_there_when_the_event_was_recorded() {
  Watched all;
  all.compute(kWrites, 0);
  CHECK_EQ(all.driver.EventRecord(all.event, nullptr), 0);
  all.compute(kWrites, 2048);
  CHECK_EQ(all.driver.StreamWaitEvent(all.stream, all.event, 0), 0);
  CHECK_EQ(all.driver.EventRecord(all.event, nullptr), 0);  // too late for that wait
  all.to_host(all.stream, 0);
  CHECK_EQ(double_races(), 0u);
  all.to_host(all.stream, 2048);
  CHECK_EQ(double_races(), 1u);
}

void test_an_order_goes_from_stream_to_stream() {
  {
    Watched all;
    all.to_host(all.stream);
    all.to_device(all.other);  // reads what the other one writes, writes what it reads
    CHECK_EQ(double_races(), 2u);
  }
  Watched all;
  all.compute(kWrites);
  all.order(all.stream, nullptr);
  all.to_host(all.stream);
  all.order(all.other, all.stream);
  all.to_device(all.other);
  CHECK_EQ(double_races(), 0u);
  all.compute(kReads);
  CHECK_EQ(double_races(), 1u);
}

void test_the_host_orders_what_it_has_seen_end() {
  {
    Watched all;
    all.to_device(all.stream);
    CHECK_EQ(all.driver.EventRecord(all.event, all.stream), 0);
    CHECK_EQ(all.driver.EventSynchronize(all.event), 0);
    all.compute(kWrites);
    CHECK_EQ(double_races(), 0u);
  }
  {
    Watched all;
    double_hold("to_device");
    all.to_device(all.stream);
    CHECK_EQ(all.driver.EventRecord(all.event, all.stream), 0);
    CHECK_EQ(all.driver.EventQuery(all.event), 600);
    all.compute(kReads, 0, 1);
    CHECK_EQ(double_races(), 1u);
    double_release("to_device");
    while (all.driver.EventQuery(all.event) != 0) {
    }
    all.compute(kWrites);
    CHECK_EQ(double_races(), 1u);
  }
  {
    Watched all;
    all.to_device(all.stream);
    CHECK_EQ(all.driver.CtxSynchronize(), 0);
    all.compute(kReads);
    CHECK_EQ(double_races(), 0u);
  }
  {
    Watched all;
    all.compute(kWrites);
    double_host_waits_for(0);
    all.to_host(all.stream);
    CHECK_EQ(double_races(), 0u);
  }
  Watched all;
  all.compute(kWrites, 0);
  const size_t recorded = double_record(0);
  all.compute(kWrites, 2048);
  double_host_waits(recorded);
  all.to_host(all.stream, 0);
  CHECK_EQ(double_races(), 0u);
  all.to_host(all.stream, 2048);
  CHECK_EQ(double_races(), 1u);
}

void test_memory_is_freed_only_when_its_copies_are_over() {
  {
    Watched all;
    all.compute(kAllocates);
    all.order(all.stream, nullptr);
    all.to_host(all.stream);
    all.compute(kFrees);
    CHECK_EQ(double_races(), 0u);
    all.compute(kAllocates, 2048, 1);  // it may get what was freed
    CHECK_EQ(double_races(), 1u);
    all.compute(kAllocates, 2048, 1);
    CHECK_EQ(double_races(), 1u);
    const std::string text = double_race_texts();
    CHECK(text.find("an operator on the default stream frees 1024 bytes ") == 0);
  }
  {
    Watched all;
    all.compute(kAllocates);
    all.order(all.stream, nullptr);
    all.to_host(all.stream);
    all.compute(kFrees);
    all.order(nullptr, all.stream);  // in time: nothing was allocated since
    all.compute(kAllocates);
    CHECK_EQ(double_races(), 0u);
  }
  Watched all;
  all.compute(kAllocates);
  all.order(all.stream, nullptr);
  all.to_host(all.stream);
  all.order(nullptr, all.stream);
  all.compute(kFrees);
  all.compute(kAllocates, 2048, 1);
  CHECK_EQ(double_races(), 0u);
  all.to_host(all.stream, 1023, 1);  // nobody's any more
  CHECK_EQ(double_races(), 1u);
}

// The block may have come from work of that stream that still runs.
void test_new_memory_is_the_streams_that_it_was_allocated_on() {
  {
    Watched all;
    all.compute(kAllocates);
    all.to_device(all.stream);
    CHECK_EQ(double_races(), 1u);
  }
  Watched all;
  all.compute_aside(kAllocates);
  all.order(all.stream, nullptr);  // the wrong one
  all.to_device(all.stream);
  CHECK_EQ(double_races(), 1u);
}

// As torch's own streams, which are non-blocking: the default one neither waits for them nor they for it.
void test_streams_that_compute_are_in_order_by_waits_alone() {
  {
    Watched all;
    all.compute(kWrites);
    all.compute_aside(kReads);
    CHECK_EQ(double_races(), 1u);
    const std::string text = double_race_texts();
    CHECK(text.find("an operator on stream ") == 0);
    CHECK(text.find(" while an operator on the default stream writes ") != std::string::npos);
  }
  {
    Watched all;
    all.compute_aside(kWrites);
    all.compute(kReads);
    CHECK_EQ(double_races(), 1u);
  }
  {
    Watched all;
    all.compute(kReads);
    all.compute_aside(kReads);  // both may
    all.compute_aside(kWrites, 1024);
    CHECK_EQ(double_races(), 0u);
  }
  Watched all;
  const uintptr_t third = double_compute_stream();
  all.compute(kWrites);
  double_wait(side(), double_record(0));
  all.compute_aside(kWrites);
  double_wait(third, double_record(side()));
  all.compute(kReads, 0, 1024, third);  // behind both
  CHECK_EQ(double_races(), 0u);
  all.compute(kReads);  // which waited for neither
  CHECK_EQ(double_races(), 1u);
  double_wait(0, double_record(third));
  all.compute(kWrites);
  CHECK_EQ(double_races(), 1u);
}

void test_a_wait_of_one_stream_is_not_another_ones() {
  {
    Watched all;
    all.to_device(all.stream);
    all.order(nullptr, all.stream);
    all.compute(kReads);
    all.compute_aside(kReads);
    CHECK_EQ(double_races(), 1u);
  }
  {
    Watched all;
    all.compute_aside(kWrites);
    all.order(all.stream, nullptr);
    all.to_host(all.stream);
    CHECK_EQ(double_races(), 1u);
  }
  Watched all;
  all.compute_aside(kWrites);
  double_host_waits_for(0);
  all.compute(kReads);
  CHECK_EQ(double_races(), 1u);
  double_host_waits_for(side());
  all.compute(kReads);
  CHECK_EQ(double_races(), 1u);
}

// Events of the driver order them with copies as torch's own do with each other.
void test_streams_that_compute_wait_in_the_call() {
  Watched all;
  double_set_late(1);
  all.compute_aside(kWrites);
  all.order(all.stream, handle_of(side()));
  all.to_host(all.stream);
  all.order(all.other, all.stream);
  all.to_device(all.other, 2048);
  all.order(handle_of(side()), all.other);
  CHECK_EQ(all.device[2048], 1);
  CHECK_EQ(all.host[0], 2);
  CHECK_EQ(all.driver.EventRecord(all.event, handle_of(side())), 0);
  CHECK_EQ(all.driver.EventQuery(all.event), 0);
  all.to_host(handle_of(side()), 3072);
  CHECK_EQ(all.host[3072], 2);
  all.compute_aside(kWrites, 0);
  all.compute_aside(kWrites, 2048);
  all.compute_aside(kWrites, 3072);
  CHECK_EQ(double_races(), 0u);
}

// torch's allocator hands a block on in the order of its stream, when what it was recorded on is over.
void test_memory_is_freed_when_every_stream_is_done_with_it() {
  {
    Watched all;
    all.compute(kAllocates);
    double_wait(side(), double_record(0));
    all.compute_aside(kReads);
    all.free(0, {});
    all.compute_aside(kAllocates, 2048);  // gets memory of its own stream
    CHECK_EQ(double_races(), 0u);
    all.compute(kAllocates, 3072);
    CHECK_EQ(double_races(), 1u);
    const std::string text = double_race_texts();
    CHECK(text.find("an owner on the default stream frees 1024 bytes ") == 0);
  }
  {
    Watched all;
    all.compute(kAllocates);
    double_wait(side(), double_record(0));
    all.compute_aside(kReads);
    double_wait(0, double_record(side()));
    all.free(0, {});
    all.compute(kAllocates);
    CHECK_EQ(double_races(), 0u);
  }
  {
    Watched all;
    all.compute(kAllocates);
    all.order(all.stream, nullptr);
    all.to_host(all.stream);
    all.order(handle_of(side()), all.stream);  // whose work is what that stream waited for, too
    all.compute_aside(kReads);
    all.free(0, {side()});
    CHECK_EQ(double_races(), 0u);
    all.compute(kAllocates);
    all.compute(kWrites);
    CHECK_EQ(double_races(), 0u);
    all.compute_aside(kReads, 0);  // recorded, but not on the block that is there now
    CHECK_EQ(double_races(), 1u);
  }
  {
    Watched all;
    all.compute(kAllocates);
    all.order(all.stream, nullptr);
    all.to_host(all.stream);
    all.free(0, {side()});  // recorded on another stream than the one that uses it
    all.compute(kAllocates);
    CHECK_EQ(double_races(), 1u);
  }
  Watched all;
  all.compute(kAllocates);
  all.free(0, {side()});
  CHECK_EQ(double_races(), 0u);
  all.compute_aside(kReads);  // nobody's any more
  CHECK_EQ(double_races(), 1u);
}

// On a card it is never the same memory: blocks are kept by stream.
void test_what_one_stream_freed_another_one_may_be_given() {
  Watched all;
  all.compute(kAllocates);
  all.compute(kWrites);
  all.free(0, {});
  all.compute_aside(kAllocates);
  all.compute_aside(kWrites);
  CHECK_EQ(double_races(), 0u);
  all.free(side(), {});
  all.compute(kAllocates);
  all.compute(kWrites);
  CHECK_EQ(double_races(), 0u);
  all.compute_aside(kReads);
  CHECK_EQ(double_races(), 1u);
}

void test_only_bytes_that_are_shared_and_written_count() {
  Watched all;
  all.compute(kReads, 0);
  all.compute(kWrites, 1024);
  all.to_host(all.stream, 0);      // both read
  all.to_host(all.stream, 2048);   // the next byte after what is written
  all.to_device(all.other, 3072);  // other bytes than the stream's
  CHECK_EQ(double_races(), 0u);
  all.to_host(all.stream, 0, 1025);
  CHECK_EQ(double_races(), 1u);
  all.compute(kWrites, 512, 1);  // read by the copy before, whatever was read around it since
  CHECK_EQ(double_races(), 2u);
}

void test_what_was_watched_is_forgotten() {
  Watched all;
  all.compute(kWrites);
  CHECK_EQ(all.driver.EventRecord(all.event, nullptr), 0);
  const size_t recorded = double_record(0);
  double_watch(1);
  CHECK(double_record(0) != recorded);
  all.to_host(all.stream);
  CHECK_EQ(double_races(), 0u);
  double_wait(0, recorded);
  CHECK_EQ(all.driver.StreamWaitEvent(nullptr, all.event, 0), 0);  // an event of before orders nothing
  all.compute(kWrites);
  CHECK_EQ(double_races(), 1u);
  double_watch(0);
  all.compute(kWrites);
  CHECK_EQ(double_races(), 0u);
}

// Neither wait would end if a copy that is wanted stayed late.
void test_a_late_copy_runs_when_it_is_waited_for() {
  Watched all;
  double_set_late(1);
  all.to_host(all.stream);
  all.order(all.other, all.stream);
  all.to_device(all.other, 2048);
  all.order(nullptr, all.other);
  CHECK_EQ(all.host[0], 2);
  CHECK_EQ(all.device[2048], 1);
  all.to_host(all.stream, 3072);
  CHECK_EQ(all.driver.EventRecord(all.event, all.stream), 0);
  CHECK_EQ(all.driver.EventSynchronize(all.event), 0);
  all.to_host(all.stream, 1024);
  double_synchronize();
  CHECK_EQ(all.host[1024], 2);
  CHECK_EQ(double_races(), 0u);
}

}  // namespace

int main() {
  test_a_copy_waits_for_what_made_its_bytes();
  test_compute_waits_for_a_copy();
  test_a_wait_is_for_what_was_there_when_the_event_was_recorded();
  test_an_order_goes_from_stream_to_stream();
  test_the_host_orders_what_it_has_seen_end();
  test_memory_is_freed_only_when_its_copies_are_over();
  test_new_memory_is_the_streams_that_it_was_allocated_on();
  test_streams_that_compute_are_in_order_by_waits_alone();
  test_a_wait_of_one_stream_is_not_another_ones();
  test_streams_that_compute_wait_in_the_call();
  test_memory_is_freed_when_every_stream_is_done_with_it();
  test_what_one_stream_freed_another_one_may_be_given();
  test_only_bytes_that_are_shared_and_written_count();
  test_what_was_watched_is_forgotten();
  test_a_late_copy_runs_when_it_is_waited_for();
  return test::result();
}
