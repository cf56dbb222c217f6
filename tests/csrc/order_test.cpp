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

// Two streams, an event, registered memory of the host and memory of a device, all watched.
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

  void compute(Use use, size_t begin = 0, size_t bytes = 1024) {
    const double_span span{reinterpret_cast<uintptr_t>(device.data()) + begin, bytes, use};
    double_compute("an operator", &span, 1);
  }
  void to_host(CudaStreamHandle on, size_t begin = 0, size_t bytes = 1024) {
    const auto source = reinterpret_cast<CudaAddress>(device.data() + begin);
    CHECK_EQ(driver.MemcpyDtoHAsync(host.data() + begin, source, bytes, on), 0);
  }
  void to_device(CudaStreamHandle on, size_t begin = 0, size_t bytes = 1024) {
    const auto destination = reinterpret_cast<CudaAddress>(device.data() + begin);
    CHECK_EQ(driver.MemcpyHtoDAsync(destination, host.data() + begin, bytes, on), 0);
  }
  // Later work of `later` comes behind what `earlier` has; null is the compute stream.
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
    CHECK(text.find(" while an operator on compute writes 1024 bytes ") != std::string::npos);
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
    double_host_waits_for_compute();
    all.to_host(all.stream);
    CHECK_EQ(double_races(), 0u);
  }
  Watched all;
  all.compute(kWrites, 0);
  const size_t position = double_compute_position();
  all.compute(kWrites, 2048);
  double_host_waits(position);
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
    CHECK_EQ(double_races(), 1u);
    const std::string text = double_race_texts();
    CHECK(text.find("an operator on compute frees 1024 bytes ") == 0);
  }
  Watched all;
  all.compute(kAllocates);
  all.order(all.stream, nullptr);
  all.to_host(all.stream);
  all.order(nullptr, all.stream);
  all.compute(kFrees);
  CHECK_EQ(double_races(), 0u);
  all.to_host(all.stream, 1023, 1);  // nobody's any more
  CHECK_EQ(double_races(), 1u);
}

// The block may have come from work of the compute stream that still runs.
void test_new_memory_is_the_compute_streams() {
  Watched all;
  all.compute(kAllocates);
  all.to_device(all.stream);
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
  double_watch(1);
  all.to_host(all.stream);
  CHECK_EQ(double_races(), 0u);
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
  test_new_memory_is_the_compute_streams();
  test_only_bytes_that_are_shared_and_written_count();
  test_what_was_watched_is_forgotten();
  test_a_late_copy_runs_when_it_is_waited_for();
  return test::result();
}
