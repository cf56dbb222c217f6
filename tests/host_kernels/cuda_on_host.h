// CUDA C++ as plain C++: what kernels/*.cu use of it. A grid runs on the calling thread, one CUDA thread
// after the other, so a kernel whose threads wait for each other cannot run here.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstring>
#include <utility>

#define __device__
#define __global__
#define __launch_bounds__(threads)

namespace {

struct Position {
  unsigned x;
};
Position blockIdx, threadIdx;  // of the CUDA thread that runs

[[maybe_unused]] unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

[[maybe_unused]] float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename... Parameters, size_t... index>
void run_grid(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void** arguments,
              std::index_sequence<index...>) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
      kernel(*static_cast<Parameters*>(arguments[index])...);
    }
  }
}

// `arguments` as cuLaunchKernel takes them: the address of each. False if there are not as many as
// parameters.
template <typename... Parameters>
bool launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void** arguments,
            size_t count) {
  if (count != sizeof...(Parameters)) return false;
  run_grid(kernel, blocks, threads, arguments, std::index_sequence_for<Parameters...>());
  return true;
}

}  // namespace
