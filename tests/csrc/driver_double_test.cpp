// The double keeps the rules of the real driver that the code under test relies on.
#include "driver_double/driver_double.h"

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "device/cuda_driver.h"

using namespace offload;

namespace {

// The entries, found as any program finds those of a driver.
struct Driver {
#define DRIVER_ENTRY(name, symbol, version, parameters) CudaResult(*name) parameters = nullptr;
  OFFLOAD_CUDA_ENTRIES(DRIVER_ENTRY)
  OFFLOAD_CUDA_LATER_ENTRIES(DRIVER_ENTRY)
#undef DRIVER_ENTRY

  Driver() {
    void* library = dlopen(DRIVER_DOUBLE_PATH, RTLD_NOW | RTLD_LOCAL);
    CHECK(library != nullptr);
#define DRIVER_FIND(name, symbol, version, parameters)              \
  name = reinterpret_cast<decltype(name)>(dlsym(library, #symbol)); \
  CHECK(name != nullptr);
    OFFLOAD_CUDA_ENTRIES(DRIVER_FIND)
    OFFLOAD_CUDA_LATER_ENTRIES(DRIVER_FIND)
#undef DRIVER_FIND
  }
};

const Driver& driver() {
  static const Driver loaded;
  return loaded;
}

CudaAddress address(void* memory) { return reinterpret_cast<CudaAddress>(memory); }

// A current context with one stream, one event and a registered buffer; all are given back at the end.
struct Session {
  CudaContext context = nullptr;
  CudaStreamHandle stream = nullptr;
  CudaEventHandle event = nullptr;
  std::vector<int> host = std::vector<int>(1024, 1);
  std::vector<int> device = std::vector<int>(1024, 2);
  size_t bytes = 1024 * sizeof(int);

  Session() {
    double_reset();
    CHECK_EQ(driver().Init(0), 0);
    CHECK_EQ(driver().DevicePrimaryCtxRetain(&context, 0), 0);
    CHECK_EQ(driver().CtxPushCurrent(context), 0);
    CHECK_EQ(driver().StreamCreateWithPriority(&stream, 1, 0), 0);
    CHECK_EQ(driver().EventCreate(&event, 2), 0);
    CHECK_EQ(driver().MemHostRegister(host.data(), bytes, 1), 0);
  }

  ~Session() {
    // The buffers go with the session.
    driver().EventRecord(event, stream);
    driver().EventSynchronize(event);
    driver().MemHostUnregister(host.data());
    driver().EventDestroy(event);
    driver().StreamDestroy(stream);
    CHECK_EQ(driver().CtxPopCurrent(&context), 0);
    driver().DevicePrimaryCtxRelease(0);
    for (const char* what : {"contexts", "streams", "events", "registrations", "pushed_contexts"}) {
      CHECK_EQ(double_live(what), 0u);
    }
  }

  CudaResult to_host(void* destination) {
    return driver().MemcpyDtoHAsync(destination, address(device.data()), bytes, stream);
  }
};

void test_streams_run_in_order_and_wait_for_events() {
  Session session;
  CudaStreamHandle other = nullptr;
  CHECK_EQ(driver().StreamCreateWithPriority(&other, 1, 0), 0);
  double_hold("to_host");
  CHECK_EQ(session.to_host(session.host.data()), 0);
  CHECK_EQ(driver().EventRecord(session.event, session.stream), 0);
  CHECK_EQ(driver().EventQuery(session.event), 600);
  CHECK_EQ(driver().StreamWaitEvent(other, session.event, 0), 0);
  std::vector<int> copied(1024, 0);
  CHECK_EQ(driver().MemcpyHtoDAsync(address(copied.data()), session.host.data(), session.bytes, other), 0);
  CHECK_EQ(double_live("pending_copies"), 2u);

  // What waits has captured the record: recording again does not change what it waits for.
  CHECK_EQ(driver().EventRecord(session.event, nullptr), 0);
  CHECK_EQ(driver().EventQuery(session.event), 0);
  double_release("to_host");
  CHECK_EQ(driver().EventRecord(session.event, other), 0);
  CHECK_EQ(driver().EventSynchronize(session.event), 0);
  CHECK(copied == session.device);
  CHECK_EQ(driver().StreamDestroy(other), 0);
  CHECK_EQ(double_misuses(), 0u);
}

void test_default_stream_waits_in_the_call() {
  Session session;
  CHECK_EQ(driver().StreamWaitEvent(nullptr, session.event, 0), 0);  // never recorded: complete
  double_hold("to_host");
  CHECK_EQ(session.to_host(session.host.data()), 0);
  CHECK_EQ(driver().EventRecord(session.event, session.stream), 0);
  std::thread releaser([] { double_release("to_host"); });
  CHECK_EQ(driver().StreamWaitEvent(nullptr, session.event, 0), 0);
  CHECK(session.host == session.device);
  releaser.join();
}

void test_pageable_copies() {
  Session session;
  std::vector<int> pageable(1024, 7);
  double_hold("to_device");
  CHECK_EQ(driver().MemcpyHtoDAsync(address(session.device.data()), pageable.data(), session.bytes,
                                    session.stream),
           0);
  std::memset(pageable.data(), 0, session.bytes);  // the call has read it
  double_release("to_device");
  CHECK_EQ(session.to_host(pageable.data()), 0);  // done when the call returns
  CHECK_EQ(pageable[0], 7);
  CHECK_EQ(pageable[1023], 7);
  // Behind a held copy the call waits for it, with a source that it has read before.
  double_hold("to_host");
  CHECK_EQ(session.to_host(session.host.data()), 0);
  std::vector<int> other(1024, 8);
  std::thread releaser([] { double_release("to_host"); });
  CHECK_EQ(
      driver().MemcpyHtoDAsync(address(session.device.data()), other.data(), session.bytes, session.stream),
      0);
  CHECK_EQ(session.host[0], 7);  // the copy before has run
  releaser.join();
  // Where the device reads it, pageable memory is read when its turn comes.
  double_set_kind("ats");
  double_hold("to_device");
  CHECK_EQ(
      driver().MemcpyHtoDAsync(address(session.device.data()), other.data(), session.bytes, session.stream),
      0);
  other[0] = 9;
  double_release("to_device");
  CHECK_EQ(session.to_host(pageable.data()), 0);
  CHECK_EQ(driver().EventRecord(session.event, session.stream), 0);
  CHECK_EQ(driver().EventSynchronize(session.event), 0);
  CHECK_EQ(pageable[0], 9);
}

// As cuMemcpyBatchAsync, of whole ints.
struct Batch {
  std::vector<CudaAddress> destinations, sources;
  std::vector<size_t> sizes;
  size_t failed = 0;

  void add(int* destination, int* source, size_t count) {
    destinations.push_back(address(destination));
    sources.push_back(address(source));
    sizes.push_back(count * sizeof(int));
  }

  CudaResult send(CudaStreamHandle stream, int access_order = 1, unsigned flags = 0) {
    CudaCopyAttributes attributes{access_order, {}, {}, flags};
    size_t first = 0;
    return driver().MemcpyBatchAsync(destinations.data(), sources.data(), sizes.data(), sizes.size(),
                                     &attributes, &first, 1, &failed, stream);
  }
};

void test_batches_copy_both_ways() {
  Session session;
  Batch batch;
  std::vector<int> more(16, 3);
  CHECK_EQ(batch.send(session.stream), 1);  // of nothing
  batch.add(&session.device[0], &session.host[512], 4);
  batch.add(&session.host[0], &session.device[512], 8);
  CHECK_EQ(batch.send(session.stream, 0), 1);
  CHECK_EQ(batch.send(session.stream, 1, 2), 1);
  CHECK_EQ(double_live("pending_copies"), 0u);
  CHECK_EQ(batch.send(session.stream), 0);
  CHECK_EQ(batch.failed, SIZE_MAX);
  CHECK_EQ(double_live("plain_batches"), 1u);
  CHECK_EQ(batch.send(session.stream, 1, 1), 0);
  CHECK_EQ(double_live("plain_batches"), 1u);
  CHECK_EQ(driver().EventRecord(session.event, session.stream), 0);
  CHECK_EQ(driver().EventSynchronize(session.event), 0);
  CHECK_EQ(session.device[3], 1);
  CHECK_EQ(session.device[4], 2);
  CHECK_EQ(session.host[7], 2);
  CHECK_EQ(session.host[8], 1);
  batch.add(more.data(), more.data() + 8, 8);  // pageable
  CHECK_EQ(batch.send(session.stream), 1);
  CHECK_EQ(batch.failed, 2u);
  CHECK_EQ(double_misuses(), 0u);
  CHECK_EQ(batch.send(nullptr), 1);
  Batch overlapping;
  overlapping.add(&session.device[0], &session.host[0], 4);
  overlapping.add(&session.device[3], &session.host[8], 4);
  CHECK_EQ(overlapping.send(session.stream), 0);
  CHECK_EQ(double_misuses(), 2u);
  CHECK_EQ(std::string(double_first_misuse()), "a batch in the legacy stream");
}

void test_destroyed_stream_finishes_its_work() {
  Session session;
  CudaStreamHandle other = nullptr;
  CHECK_EQ(driver().StreamCreateWithPriority(&other, 1, 0), 0);
  double_hold("to_host");
  CHECK_EQ(
      driver().MemcpyDtoHAsync(session.host.data(), address(session.device.data()), session.bytes, other), 0);
  CHECK_EQ(driver().EventRecord(session.event, other), 0);
  CHECK_EQ(driver().StreamDestroy(other), 0);
  double_release("to_host");
  CHECK_EQ(driver().EventSynchronize(session.event), 0);
  CHECK(session.host == session.device);
}

void test_failing_copy_loses_the_context() {
  Session session;
  double_hold("to_host");
  double_fail_copy("to_host", 2, 700);
  CHECK_EQ(session.to_host(session.host.data()), 0);
  CHECK_EQ(session.to_host(session.host.data()), 0);
  CHECK_EQ(session.to_host(session.host.data()), 0);
  CHECK_EQ(driver().EventRecord(session.event, session.stream), 0);
  double_release("to_host");
  CHECK_EQ(driver().EventSynchronize(session.event), 700);
  CHECK(session.host == session.device);  // of the first copy
  CHECK_EQ(session.to_host(session.host.data()), 700);
  CHECK_EQ(driver().EventQuery(session.event), 700);
  CHECK_EQ(driver().MemHostUnregister(session.host.data()), 700);
  CHECK_EQ(double_live("registrations"), 0u);
  double_reset();
  CHECK_EQ(driver().MemHostRegister(session.host.data(), session.bytes, 1), 0);
  CHECK_EQ(session.to_host(session.host.data()), 0);
}

void test_nth_call_fails() {
  Session session;
  CHECK_EQ(double_fail("cuEventQuery", 2, 999, 0), 1);
  CHECK_EQ(driver().EventQuery(session.event), 0);
  CHECK_EQ(driver().EventQuery(session.event), 999);
  CHECK_EQ(driver().EventQuery(session.event), 0);
  CHECK_EQ(double_fail("cuEventQuery", 1, 999, 1), 1);
  CHECK_EQ(driver().EventQuery(session.event), 999);
  CHECK_EQ(driver().EventQuery(session.event), 999);
  CHECK_EQ(double_fail("cuEventQuery", 0, 0, 0), 1);
  CHECK_EQ(driver().EventQuery(session.event), 0);
  CHECK_EQ(double_calls("cuEventQuery"), 6u);
  CHECK_EQ(double_fail("cuNothing", 1, 999, 0), 0);
  CHECK_EQ(double_calls("cuNothing"), SIZE_MAX);
  CHECK_EQ(double_live("nothing"), SIZE_MAX);
}

void test_misuse_is_refused_and_counted() {
  Session session;
  CHECK_EQ(std::string(double_first_misuse()), "");
  std::vector<int> bigger(2048);
  CHECK_EQ(driver().MemHostRegister(session.host.data() + 8, 64, 1), 712);
  CHECK_EQ(std::string(double_first_misuse()), "registering memory that is registered already");
  CHECK_EQ(driver().MemHostRegister(bigger.data(), session.bytes, 1), 0);
  CHECK_EQ(driver().MemcpyDtoHAsync(bigger.data(), address(session.device.data()), session.bytes + 4,
                                    session.stream),
           1);
  double_hold("to_host");
  CHECK_EQ(session.to_host(bigger.data()), 0);
  CHECK_EQ(driver().MemHostUnregister(bigger.data()), 0);  // the copy above uses it
  double_release("to_host");
  CHECK_EQ(driver().MemHostUnregister(bigger.data()), 713);
  CHECK_EQ(double_misuses(), 4u);

  CudaEventHandle gone = nullptr;
  CHECK_EQ(driver().EventCreate(&gone, 2), 0);
  CHECK_EQ(driver().EventDestroy(gone), 0);
  CHECK_EQ(driver().EventQuery(gone), 400);
  CHECK_EQ(driver().EventRecord(session.event, reinterpret_cast<CudaStreamHandle>(gone)), 400);
  CudaStreamHandle blocking = nullptr;
  CHECK_EQ(driver().StreamCreateWithPriority(&blocking, 0, 0), 0);
  CHECK_EQ(driver().StreamDestroy(blocking), 0);
  std::thread([&] { CHECK_EQ(driver().EventQuery(session.event), 201); }).join();
  CHECK_EQ(double_misuses(), 8u);

  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* const unmapped = reinterpret_cast<void*>(page);  // the system maps nothing so low
  CHECK_EQ(driver().MemHostRegister(unmapped, page, 1), 1);
  double_set_kind("ats");
  CHECK_EQ(driver().MemAdvise(address(unmapped), page, 1, -1), 1);
  CHECK_EQ(driver().MemAdvise(address(bigger.data()), page, 1, -1), 0);
  CHECK_EQ(driver().MemPrefetchAsync(address(bigger.data()), page, 0, blocking), 400);
  CudaAddress discarded = address(bigger.data());
  size_t discarded_bytes = 1;
  CHECK_EQ(driver().MemDiscardBatchAsync(&discarded, &discarded_bytes, 1, 0, blocking), 400);
  CHECK_EQ(driver().MemHostRegister(bigger.data(), 64, 8), 801);  // read-only
  CHECK_EQ(driver().EventCreate(&gone, 4), 1);                    // between processes, and timed
  CHECK_EQ(driver().StreamWaitEvent(session.stream, session.event, 1), 1);
  CHECK_EQ(double_misuses(), 9u);
  // The queue is empty before the memory of the copy above goes.
  CHECK_EQ(driver().EventRecord(session.event, session.stream), 0);
  CHECK_EQ(driver().EventSynchronize(session.event), 0);
}

void test_devices_belong_to_contexts() {
  Session session;
  double_set_device_count(2);
  CudaContext second = nullptr;
  CHECK_EQ(driver().DevicePrimaryCtxRetain(&second, 2), 101);
  CHECK_EQ(driver().DevicePrimaryCtxRetain(&second, 1), 0);
  CHECK_EQ(driver().CtxPushCurrent(second), 0);
  CHECK_EQ(driver().EventRecord(session.event, session.stream), 400);  // of the first context
  CHECK_EQ(driver().CtxPopCurrent(&second), 0);
  CHECK_EQ(driver().DevicePrimaryCtxRelease(1), 0);
  CHECK_EQ(driver().CtxPushCurrent(second), 201);
  double_set_device_count(0);
  CHECK_EQ(driver().Init(0), 100);
  double_set_device_count(1);
  for (const char* kind : {"discrete", "hmm", "ats", "integrated"}) CHECK_EQ(double_set_kind(kind), 1);
  CHECK_EQ(double_set_kind("toaster"), 0);
  int value = 0;
  CHECK_EQ(driver().DeviceGetAttribute(&value, 18, 0), 0);  // CU_DEVICE_ATTRIBUTE_INTEGRATED
  CHECK_EQ(value, 1);
  CHECK_EQ(driver().DeviceGetAttribute(&value, 100000, 0), 1);
  double_set_host_numa_node(5);
  CHECK_EQ(driver().DeviceGetAttribute(&value, 134, 0), 0);  // CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID
  CHECK_EQ(value, 5);
  double_set_version(12010);
  CHECK_EQ(driver().DeviceGetAttribute(&value, 134, 0), 1);
  CudaAddress managed = 0;
  int other = 0;
  double_set_attribute(83, 0);  // CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY
  CHECK_EQ(driver().DeviceGetAttribute(&value, 83, 0), 0);
  CHECK_EQ(value, 0);
  CHECK_EQ(driver().MemAllocManaged(&managed, 8, 1), 801);
  double_set_attribute(99, 0);  // CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED
  CHECK_EQ(driver().MemHostRegister(&other, sizeof(other), 1), 801);
}

void test_a_capture_refuses_what_it_does_not_see() {
  Session session;
  double_set_capturing(1);
  CHECK_EQ(driver().EventQuery(session.event), 900);
  CHECK_EQ(driver().EventSynchronize(session.event), 900);
  CHECK_EQ(driver().MemHostUnregister(session.host.data()), 900);
  CHECK_EQ(double_live("registrations"), 1u);
  CHECK_EQ(double_misuses(), 3u);
  CHECK_EQ(session.to_host(session.host.data()), 0);  // in a stream that is not captured
  CHECK_EQ(driver().EventRecord(session.event, session.stream), 0);
  int mode = 3;
  CHECK_EQ(driver().ThreadExchangeStreamCaptureMode(&mode), 1);
  mode = 2;
  CHECK_EQ(driver().ThreadExchangeStreamCaptureMode(&mode), 0);
  CHECK_EQ(mode, 0);  // what it was
  CHECK_EQ(driver().EventSynchronize(session.event), 0);
  CHECK_EQ(driver().CtxSynchronize(), 900);  // the stream that is captured is of the context
  CHECK_EQ(driver().ThreadExchangeStreamCaptureMode(&mode), 0);
  CHECK_EQ(mode, 2);
  CHECK_EQ(driver().EventSynchronize(session.event), 900);
  double_set_capturing(0);
  CHECK_EQ(driver().EventSynchronize(session.event), 0);
}

void test_symbols_by_version() {
  using Find = CudaResult (*)(const char*, void**, int, unsigned long long, int*);
  void* library = dlopen(DRIVER_DOUBLE_PATH, RTLD_NOW | RTLD_LOCAL);
  const auto find = reinterpret_cast<Find>(dlsym(library, "cuGetProcAddress_v2"));
  double_reset();
  void* found = nullptr;
  int result = -1;
  CHECK_EQ(find("cuMemHostRegister", &found, 6050, 0, &result), 0);
  CHECK(found == reinterpret_cast<void*>(driver().MemHostRegister));
  CHECK_EQ(find("cuMemHostRegister", &found, 4000, 0, &result), 0);
  CHECK(found == nullptr && result == 2);
  double_hide("cuMemHostRegister_v2");
  CHECK_EQ(find("cuMemHostRegister", &found, 6050, 0, &result), 0);
  CHECK(found == nullptr && result == 1);
  CHECK_EQ(find("cuInit", &found, 13010, 0, &result), 1);  // a driver of 13.0 knows no 13.1
  double_set_proc_address(1);
  CHECK_EQ(find("cuInit", &found, 2000, 0, &result), 801);
  dlclose(library);
}

void test_forked_child_has_no_driver() {
  Session session;
  const pid_t child = fork();
  if (child == 0) _exit(driver().Init(0) == 3 && driver().EventQuery(session.event) == 3 ? 0 : 1);
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
}

}  // namespace

int main() {
  test_streams_run_in_order_and_wait_for_events();
  test_default_stream_waits_in_the_call();
  test_pageable_copies();
  test_batches_copy_both_ways();
  test_destroyed_stream_finishes_its_work();
  test_failing_copy_loses_the_context();
  test_nth_call_fails();
  test_misuse_is_refused_and_counted();
  test_devices_belong_to_contexts();
  test_a_capture_refuses_what_it_does_not_see();
  test_symbols_by_version();
  test_forked_child_has_no_driver();
  return test::result();
}
