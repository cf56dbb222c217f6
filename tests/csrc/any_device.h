// A device for the tests of what every device must keep: HostDevice, or CudaDevice over the driver double.
//
// Ownership: owns the device and the host memory of the test, which is registered for kCudaPinned.
// Threads: used by the test's thread alone.
// Invariants: for the CUDA kinds, the end finds every object of the driver given back and no rule broken.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "device/cuda_device.h"
#include "device/host_device.h"
#include "driver_double/driver_double.h"

namespace offload::test {

enum class DeviceKind { kCpu, kCudaPinned, kCudaPageable };

inline constexpr DeviceKind kEveryDevice[] = {DeviceKind::kCpu, DeviceKind::kCudaPinned,
                                              DeviceKind::kCudaPageable};

class AnyDevice {
 public:
  explicit AnyDevice(DeviceKind kind) : host_memory(256, '.') {
    if (kind == DeviceKind::kCpu) {
      cpu_ = std::make_shared<HostDevice>();
      device = cpu_;
      return;
    }
    double_reset();
    CudaDeviceOptions options;
    options.driver_path = DRIVER_DOUBLE_PATH;
    device = std::make_shared<CudaDevice>(options);
    pinned_ = kind == DeviceKind::kCudaPinned;
    if (pinned_) device->pin(host_memory.data(), host_memory.size());
  }

  ~AnyDevice() {
    if (pinned_) device->unpin(host_memory.data(), host_memory.size());
    device.reset();
    if (cpu_) return;
    for (const char* what :
         {"contexts", "streams", "events", "registrations", "modules", "pushed_contexts"}) {
      if (double_live(what) != 0) report_failure(__FILE__, __LINE__, std::string("left alive: ") + what);
    }
    if (double_misuses() != 0) report_failure(__FILE__, __LINE__, double_first_misuse());
  }

  void hold(Direction direction) {
    if (cpu_) return cpu_->hold(direction);
    double_hold(name(direction));
  }

  void release(Direction direction) {
    if (cpu_) return cpu_->release(direction);
    double_release(name(direction));
  }

  std::vector<char> host_memory;
  std::shared_ptr<Device> device;

 private:
  static const char* name(Direction direction) {
    return direction == Direction::kToHost ? "to_host" : "to_device";
  }

  std::shared_ptr<HostDevice> cpu_;  // null for a CUDA device
  bool pinned_ = false;
};

}  // namespace offload::test
