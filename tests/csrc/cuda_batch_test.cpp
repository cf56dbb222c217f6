// Copies of one submission on a CudaDevice: one call of the driver, and what happens where there is none.
#include <algorithm>
#include <string>
#include <vector>

#include "any_device.h"
#include "check.h"
#include "device/cuda_device.h"

namespace offload {
namespace {

constexpr int64_t kHangNs = 60'000'000'000;  // far more than anything here takes

struct Fixture {
  test::AnyDevice any{test::DeviceKind::kCudaPinned};
  Device& device = *any.device;
  std::unique_ptr<Stream> to_host = device.create_stream("to_host");
  std::unique_ptr<Stream> to_device = device.create_stream("to_device");
  char* host = any.host_memory.data();  // registered
  std::vector<char> on_device = std::vector<char>(64, 'd');

  // Two copies; the bytes are right whatever way they went.
  void copy_two(Direction direction, char value) {
    const bool up = direction == Direction::kToDevice;
    char* const source = up ? host : on_device.data();
    char* const destination = up ? on_device.data() : host;
    std::fill_n(source, 64, value);
    std::fill_n(destination, 64, '.');
    const CopySpan batch[] = {{destination, source, 16}, {destination + 32, source + 32, 8}};
    CHECK(device.submit_copies(up ? *to_device : *to_host, direction, batch).wait(kHangNs));
    const std::string rest(16, '.');
    CHECK_EQ(std::string(destination, 48),
             std::string(16, value) + rest + std::string(8, value) + rest.substr(8));
  }
};

void small_copies_go_in_one_call() {
  Fixture f;
  CHECK(f.device.sends_batches());
  f.copy_two(Direction::kToDevice, 'u');
  f.copy_two(Direction::kToHost, 'v');
  CHECK_EQ(double_calls("cuMemcpyBatchAsync"), 2u);
  CHECK_EQ(double_live("plain_batches"), 0u);
  CHECK_EQ(double_calls("cuMemcpyHtoDAsync_v2") + double_calls("cuMemcpyDtoHAsync_v2"), 0u);
  // One alone needs no batch.
  CHECK(
      f.device.submit_copy(*f.to_device, Direction::kToDevice, f.on_device.data(), f.host, 8).wait(kHangNs));
  CHECK_EQ(double_calls("cuMemcpyBatchAsync"), 2u);
}

void a_refused_batch_is_sent_copy_by_copy() {
  Fixture f;
  double_fail("cuMemcpyBatchAsync", 1, 801, 0);
  f.copy_two(Direction::kToDevice, 'u');
  f.copy_two(Direction::kToHost, 'v');
  CHECK_EQ(double_calls("cuMemcpyBatchAsync"), 1u);  // not asked again
  CHECK(!f.device.sends_batches());
}

void an_older_driver_takes_copy_by_copy() {
  double_reset();
  double_set_version(12040);
  CudaDeviceOptions options;
  // A table of its own: what a driver has is looked up once.
  options.driver_path = std::string(DRIVER_DOUBLE_PATH).insert(1, "./");
  CudaDevice device(options);
  CHECK(!device.sends_batches());
  std::vector<char> host(8, 'h'), on_device(8);
  device.pin(host.data(), 8);
  const auto stream = device.create_stream("to_device");
  const CopySpan batch[] = {{&on_device[0], &host[0], 2}, {&on_device[4], &host[4], 2}};
  CHECK(device.submit_copies(*stream, Direction::kToDevice, batch).wait(kHangNs));
  CHECK_EQ(std::string(on_device.data(), 8), std::string("hh\0\0hh\0\0", 8));
  CHECK_EQ(double_calls("cuMemcpyBatchAsync"), 0u);
}

void a_batch_with_pageable_memory_is_sent_copy_by_copy() {
  Fixture f;
  char pageable = 'p';
  f.host[0] = 'h';
  const CopySpan batch[] = {{&f.on_device[0], f.host, 1}, {&f.on_device[1], &pageable, 1}};
  CHECK(f.device.submit_copies(*f.to_device, Direction::kToDevice, batch).wait(kHangNs));
  CHECK_EQ(std::string(f.on_device.data(), 3), "hpd");
  CHECK_EQ(static_cast<CudaDevice&>(f.device).facts().pageable_copy_count, 1u);
  CHECK_EQ(double_calls("cuMemcpyBatchAsync"), 0u);
  CHECK(f.device.sends_batches());
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  small_copies_go_in_one_call();
  a_refused_batch_is_sent_copy_by_copy();
  an_older_driver_takes_copy_by_copy();
  a_batch_with_pageable_memory_is_sent_copy_by_copy();
  return test::result();
}
