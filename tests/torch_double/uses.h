// Tells the driver double what operators of card.cpp do with memory and on which stream, so that it finds
// what no wait orders (driver_double/order.h). The double is the library of OFFLOAD_CUDA_DRIVER.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <cstdlib>
#include <set>
#include <string>
#include <vector>

#include "../driver_double/driver_double.h"

namespace card {

// What a thread computes on, as autograd's threads do on that of a forward: a stream of the driver's.
inline thread_local c10::StreamId current_stream = 0;

struct Double {
  decltype(&double_compute_stream) compute_stream = nullptr;
  decltype(&double_compute) compute = nullptr;
  decltype(&double_free) free = nullptr;
  decltype(&double_record) record = nullptr;
  decltype(&double_wait) wait = nullptr;
  decltype(&double_host_waits) host_waits = nullptr;
  decltype(&double_host_waits_for) host_waits_for = nullptr;
  decltype(&double_synchronize) synchronize = nullptr;

  Double() {
    const char* path = std::getenv("OFFLOAD_CUDA_DRIVER");
    void* library = path == nullptr ? nullptr : dlopen(path, RTLD_NOW);
    TORCH_CHECK(library != nullptr, "OFFLOAD_CUDA_DRIVER names no library");
    const auto find = [&]<typename Function>(Function*& function, const char* name) {
      function = reinterpret_cast<Function*>(dlsym(library, name));
      TORCH_CHECK(function != nullptr, path, " has no ", name);
    };
    find(compute_stream, "double_compute_stream");
    find(compute, "double_compute");
    find(free, "double_free");
    find(record, "double_record");
    find(wait, "double_wait");
    find(host_waits, "double_host_waits");
    find(host_waits_for, "double_host_waits_for");
    find(synchronize, "double_synchronize");
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
    if (!spans_.empty()) driver_double().compute(current_stream, what_.c_str(), spans_.data(), spans_.size());
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

inline void host_waits() { driver_double().host_waits_for(current_stream); }

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
