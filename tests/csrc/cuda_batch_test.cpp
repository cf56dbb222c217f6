// Copies of one submission on a CudaDevice: one call of the driver, one launch where it has no such call, and
// what happens where that is refused.
#include <algorithm>
#include <memory>
#include <span>
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
  CHECK(f.device.copies_together() == CopiesTogether::kInOneCall);
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
  CHECK(f.device.copies_together() == CopiesTogether::kOneByOne);
}

// A driver before CUDA 12.8, and as much memory as a launch's largest span and more.
struct OlderDriver {
  OlderDriver() {
    double_reset();
    double_set_version(12040);
    CudaDeviceOptions options;
    // A table of its own: what a driver has is looked up once.
    options.driver_path = std::string(DRIVER_DOUBLE_PATH).insert(1, "./");
    device = std::make_unique<CudaDevice>(options);
    device->pin(host.data(), host.size());
  }
  ~OlderDriver() {
    stream.reset();
    device.reset();
    for (const char* what : {"contexts", "streams", "events", "registrations"}) {
      CHECK_EQ(double_live(what), 0u);
    }
    CHECK_EQ(double_live("modules"), modules_left);
    CHECK_EQ(std::string(double_first_misuse()), "");
  }

  void load_kernel() {
    device->load_copy_kernel(
        std::as_bytes(std::span("\x7f"
                                "ELF")));
  }

  // Copies with as many bytes each between them, both ways; the bytes are right whatever way they went.
  void copy(Direction direction, const std::vector<size_t>& sizes_bytes) {
    const bool up = direction == Direction::kToDevice;
    std::vector<char>&from = up ? host : on_device, &to = up ? on_device : host;
    for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<char>(i * 31 + i / 251);
    std::ranges::fill(to, '.');
    std::vector<CopySpan> copies;
    std::string expected(to.size(), '.');
    for (size_t at = 1; const size_t bytes : sizes_bytes) {
      copies.push_back({to.data() + at, from.data() + at, bytes});
      std::copy_n(from.data() + at, bytes, expected.data() + at);
      at += 2 * bytes;
    }
    if (!stream) stream = device->create_stream("copies");
    CHECK(device->submit_copies(*stream, direction, copies).wait(kHangNs));
    CHECK(std::string(to.data(), to.size()) == expected);
  }
  void copy_both_ways(const std::vector<size_t>& sizes_bytes) {
    for (const Direction direction : {Direction::kToHost, Direction::kToDevice}) copy(direction, sizes_bytes);
  }
  static size_t calls_of_copies() {
    return double_calls("cuMemcpyHtoDAsync_v2") + double_calls("cuMemcpyDtoHAsync_v2") +
           double_calls("cuMemcpyBatchAsync");
  }

  std::vector<char> host = std::vector<char>(1 << 20), on_device = std::vector<char>(1 << 20);
  std::unique_ptr<CudaDevice> device;
  std::unique_ptr<Stream> stream;
  size_t modules_left = 0;  // that the driver does not take back
};

void an_older_driver_takes_copy_by_copy() {
  OlderDriver f;
  CHECK(f.device->copies_together() == CopiesTogether::kOneByOne);
  f.copy_both_ways({2, 2});
  CHECK_EQ(f.calls_of_copies(), 4u);
  CHECK_EQ(double_calls("cuMemcpyBatchAsync") + double_calls("cuLaunchKernel"), 0u);
}

void an_older_driver_is_given_small_copies_by_a_kernel() {
  OlderDriver f;
  f.load_kernel();
  CHECK(f.device->copies_together() == CopiesTogether::kByKernel);
  f.copy_both_ways({2, 3});
  f.copy_both_ways(std::vector<size_t>(65, 7));  // one more than a launch takes
  CHECK_EQ(double_calls("cuLaunchKernel"), 2u * (1 + 2));
  CHECK_EQ(f.calls_of_copies(), 0u);
  // Large ones go to the copy engines, and one alone needs no kernel.
  f.copy_both_ways({5, (64 << 10) + 1, 64 << 10});
  CHECK_EQ(double_calls("cuLaunchKernel"), 2u * (1 + 2 + 1));
  CHECK_EQ(f.calls_of_copies(), 2u);
  f.copy_both_ways({5, (64 << 10) + 1});
  f.copy_both_ways({5});
  CHECK_EQ(double_calls("cuLaunchKernel"), 2u * (1 + 2 + 1));
  CHECK_EQ(f.calls_of_copies(), 2u * (1 + 2 + 1));
  CHECK_THROWS(ErrorKind::kState, "has its kernel", f.load_kernel());
}

void a_refused_launch_is_sent_copy_by_copy() {
  OlderDriver f;
  f.load_kernel();
  double_fail("cuLaunchKernel", 2, 701, 0);  // CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
  f.copy(Direction::kToDevice, std::vector<size_t>(65, 7));
  CHECK_EQ(f.calls_of_copies(), 65u);
  f.copy_both_ways({2, 3});
  CHECK_EQ(double_calls("cuLaunchKernel"), 2u);  // not asked again
  CHECK(f.device->copies_together() == CopiesTogether::kOneByOne);
}

void a_refused_kernel_leaves_copy_by_copy() {
  for (const char* entry : {"cuModuleLoadData", "cuModuleGetFunction"}) {
    OlderDriver f;
    double_fail(entry, 1, 209, 0);  // CUDA_ERROR_NO_BINARY_FOR_GPU
    CHECK_THROWS(ErrorKind::kDevice, entry, f.load_kernel());
    CHECK_EQ(double_live("modules"), 0u);
    f.copy_both_ways({2, 3});
    CHECK_EQ(double_calls("cuLaunchKernel"), 0u);
    f.load_kernel();
    f.copy_both_ways({2, 3});
    CHECK_EQ(double_calls("cuLaunchKernel"), 2u);
  }
  OlderDriver f;
  CHECK_THROWS(ErrorKind::kDevice, "INVALID_IMAGE",
               f.device->load_copy_kernel(std::as_bytes(std::span("text"))));
  double_set_attribute(91, 0);  // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
  CHECK_THROWS(ErrorKind::kDevice, "at the host's addresses", f.load_kernel());
  CHECK_EQ(double_live("modules"), 0u);
}

// Once, and from then on. The last leaves a module behind in the double.
void no_failing_call_loses_bytes_or_handles() {
  for (const std::string entry :
       {"cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuModuleUnload"}) {
    for (const int lasting : {0, 1}) {
      OlderDriver f;
      f.modules_left = double_live("modules");
      double_fail(entry.c_str(), 1, 719, lasting);  // CUDA_ERROR_LAUNCH_FAILED
      if (entry == "cuModuleLoadData" || entry == "cuModuleGetFunction") {
        CHECK_THROWS(ErrorKind::kDevice, entry, f.load_kernel());
      } else {
        f.load_kernel();
      }
      f.copy_both_ways({2, 3});
      CHECK((f.device->copies_together() == CopiesTogether::kByKernel) == (entry == "cuModuleUnload"));
      if (entry == "cuModuleUnload") ++f.modules_left;
    }
  }
}

void a_lost_context_is_told_by_the_copies() {
  OlderDriver f;
  f.load_kernel();
  f.stream = f.device->create_stream("copies");
  double_fail_copy("to_device", 2, 700);
  const CopySpan copies[] = {{&f.on_device[0], &f.host[0], 2}, {&f.on_device[4], &f.host[4], 2}};
  const Ticket ticket = f.device->submit_copies(*f.stream, Direction::kToDevice, copies);
  CHECK_THROWS(ErrorKind::kDevice, "ILLEGAL_ADDRESS", static_cast<void>(ticket.wait(kHangNs)));
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
  CHECK(f.device.copies_together() == CopiesTogether::kInOneCall);
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  small_copies_go_in_one_call();
  a_refused_batch_is_sent_copy_by_copy();
  an_older_driver_takes_copy_by_copy();
  an_older_driver_is_given_small_copies_by_a_kernel();
  a_refused_launch_is_sent_copy_by_copy();
  a_refused_kernel_leaves_copy_by_copy();
  a_lost_context_is_told_by_the_copies();
  a_batch_with_pageable_memory_is_sent_copy_by_copy();
  no_failing_call_loses_bytes_or_handles();
  return test::result();
}
