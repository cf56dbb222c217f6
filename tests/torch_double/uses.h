// Tells the driver double what operators of card.cpp do with memory, so that it finds what no wait orders
// (driver_double/order.h). The double is the library of OFFLOAD_CUDA_DRIVER; without it nothing is told.
#pragma once

#include <ATen/core/Tensor.h>
#include <dlfcn.h>

#include <cstdlib>
#include <set>
#include <string>
#include <vector>

#include "../driver_double/driver_double.h"

namespace card {

struct Double {
  decltype(&double_compute) compute = nullptr;
  decltype(&double_host_waits_for_compute) host_waits_for_compute = nullptr;

  Double() {
    const char* path = std::getenv("OFFLOAD_CUDA_DRIVER");
    void* library = path == nullptr ? nullptr : dlopen(path, RTLD_NOW);
    if (library == nullptr) return;
    compute = reinterpret_cast<decltype(compute)>(dlsym(library, "double_compute"));
    host_waits_for_compute =
        reinterpret_cast<decltype(host_waits_for_compute)>(dlsym(library, "double_host_waits_for_compute"));
  }
};

inline const Double& driver_double() {
  static const Double loaded;
  return loaded;
}

enum Use { kReads = 0, kWrites = 1, kAllocates = 2, kFrees = 3, kLooks = 4 };  // the last one: at no bytes

// Those of one operator, told when it has run.
class Uses {
 public:
  explicit Uses(std::string what) : what_(std::move(what)) {}
  Uses(const Uses&) = delete;
  ~Uses() {
    if (!spans_.empty() && driver_double().compute != nullptr) {
      driver_double().compute(what_.c_str(), spans_.data(), spans_.size());
    }
  }

  void add(const void* memory, size_t bytes, Use use) {
    if (bytes > 0 && use != kLooks) spans_.push_back({reinterpret_cast<uintptr_t>(memory), bytes, use});
  }

  // From its first element to its last.
  void add(const at::Tensor& tensor, Use use) {
    if (tensor.numel() == 0) return;
    size_t elements = 1;
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      elements += static_cast<size_t>((tensor.size(i) - 1) * tensor.stride(i));
    }
    add(tensor.const_data_ptr(), elements * tensor.itemsize(), use);
  }

 private:
  const std::string what_;
  std::vector<double_span> spans_;
};

inline void host_waits() {
  if (driver_double().host_waits_for_compute != nullptr) driver_double().host_waits_for_compute();
}

// Whether it makes a tensor of another one's form, whose bytes it does not read.
inline bool only_looks(const std::string& name) {
  return name.find("_like") != std::string::npos || name.starts_with("aten::new_") ||
         name.starts_with("aten::empty");
}

// The operators whose result has a size that depends on values: CUDA's wait for it on the host.
inline bool waits_for_size(const std::string& name) {
  static const std::set<std::string> names = {"aten::nonzero", "aten::masked_select", "aten::_unique2",
                                              "aten::unique_dim", "aten::unique_consecutive"};
  return names.contains(name);
}

}  // namespace card
