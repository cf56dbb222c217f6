// What a launch does with memory, told to the driver double of OFFLOAD_CUDA_DRIVER where it watches
// (driver_double/order.h).
#include "accesses.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "../driver_double/driver_double.h"

namespace {

enum Use { kReads = 0, kWrites = 1 };

class Accesses {
 public:
  explicit Accesses(void** arguments) : arguments_(arguments) {}

  template <typename Value>
  Value get(size_t index) const {
    return *static_cast<Value*>(arguments_[index]);
  }
  void add(size_t pointer, size_t bytes, Use use) {
    if (const auto begin = get<uintptr_t>(pointer)) spans.push_back({begin, bytes, use});
  }
  // `format`: the argument with a FloatFormat, of which fp32 is 0 and the others have two bytes.
  void add_values(size_t pointer, size_t format, size_t count, Use use) {
    add(pointer, count * (get<int>(format) == 0 ? 4 : 2), use);
  }

  std::vector<double_span> spans;

 private:
  void** const arguments_;
};

}  // namespace

void note_launch(void* stream, const std::string& kernel, void** arguments) {
  const char* path = std::getenv("OFFLOAD_CUDA_DRIVER");
  void* library = path == nullptr ? nullptr : dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return;
  const auto compute = reinterpret_cast<decltype(&double_compute)>(dlsym(library, "double_compute"));
  if (compute == nullptr) return;
  const auto scales_bytes = [](size_t count) { return (count + 255) / 256 * sizeof(float); };
  Accesses accesses(arguments);
  if (kernel.starts_with("encode")) {  // values, format, codes, scales, count
    const auto count = static_cast<size_t>(accesses.get<long long>(4));
    accesses.add_values(0, 1, count, kReads);
    accesses.add(2, count, kWrites);
    accesses.add(3, scales_bytes(count), kWrites);
  } else if (kernel.starts_with("decode")) {  // codes, scales, values, format, count
    const auto count = static_cast<size_t>(accesses.get<long long>(4));
    accesses.add(0, count, kReads);
    accesses.add(1, scales_bytes(count), kReads);
    accesses.add_values(2, 3, count, kWrites);
  } else {  // ARRAYS of kernels/update.cu
    const auto count = static_cast<size_t>(accesses.get<long long>(12));
    const size_t moment_bytes = kernel.ends_with("_int8") ? 1 : kernel.ends_with("_bf16") ? 2 : 4;
    accesses.add_values(0, 1, count, kReads);
    accesses.add_values(2, 3, count, kWrites);
    accesses.add_values(4, 5, count, kWrites);
    accesses.add_values(6, 5, count, kWrites);
    for (const size_t moment : {7, 8}) accesses.add(moment, count * moment_bytes, kWrites);
    for (const size_t scales : {9, 10}) accesses.add(scales, scales_bytes(count), kWrites);
    accesses.add(13, sizeof(float), kReads);
  }
  compute(reinterpret_cast<uintptr_t>(stream), kernel.c_str(), accesses.spans.data(), accesses.spans.size());
}
