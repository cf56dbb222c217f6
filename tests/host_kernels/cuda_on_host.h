// CUDA C++ as plain C++: what kernels/*.cu use of it. A grid runs on the calling thread, one CUDA thread
// after the other. Where the threads of a warp exchange values, those of a block run as fibers that take
// turns.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>

#define __device__
#define __global__
#define __shared__ static  // one block runs at a time
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

// The threads of one block as fibers: each runs until it meets the others, and again when all that run have
// come.
class Fibers {
 public:
  static void run(unsigned threads, const std::function<void()>& thread) {
    if (threads > kMost) std::abort();
    work = &thread;
    for (unsigned i = 0; i < threads; ++i) {
      getcontext(&fibers[i]);
      fibers[i].uc_stack.ss_sp = stacks[i];
      fibers[i].uc_stack.ss_size = sizeof stacks[i];
      fibers[i].uc_link = &scheduler;
      makecontext(&fibers[i], &begin, 0);
      is_running[i] = true;
    }
    for (bool any = true; any;) {
      any = false;
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
        if (!is_running[threadIdx.x]) continue;
        any = true;
        swapcontext(&scheduler, &fibers[threadIdx.x]);
      }
    }
    work = nullptr;
  }

  // What the thread whose number differs by `mask` gives, for `value`.
  static unsigned exchange(unsigned value, unsigned mask) {
    if (work == nullptr) std::abort();  // launched with LAUNCHER
    given[threadIdx.x] = value;
    meet();
    const unsigned other = given[threadIdx.x ^ mask];
    meet();  // before the next value is given
    return other;
  }

 private:
  static constexpr unsigned kMost = 256;

  static void begin() {
    (*work)();
    is_running[threadIdx.x] = false;
  }
  static void meet() { swapcontext(&fibers[threadIdx.x], &scheduler); }

  static inline const std::function<void()>* work = nullptr;
  static inline ucontext_t scheduler, fibers[kMost];
  static inline bool is_running[kMost];
  static inline unsigned given[kMost];
  alignas(16) static inline char stacks[kMost][16384];
};

[[maybe_unused]] unsigned __shfl_xor_sync(unsigned, unsigned value, int mask) {
  return Fibers::exchange(value, static_cast<unsigned>(mask));
}

template <typename... Parameters, size_t... index>
void run_grid(void (*kernel)(Parameters...), bool exchanges, unsigned blocks, unsigned threads,
              void** arguments, std::index_sequence<index...>) {
  const auto thread = [&] { kernel(*static_cast<Parameters*>(arguments[index])...); };
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    if (exchanges) {
      Fibers::run(threads, thread);
    } else {
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) thread();
    }
  }
}

// `arguments` as cuLaunchKernel takes them: the address of each. False if there are not as many as
// parameters.
template <typename... Parameters>
bool launch(void (*kernel)(Parameters...), bool exchanges, unsigned blocks, unsigned threads,
            void** arguments, size_t count) {
  if (count != sizeof...(Parameters)) return false;
  run_grid(kernel, exchanges, blocks, threads, arguments, std::index_sequence_for<Parameters...>());
  return true;
}

}  // namespace

// `exchanges`: whether the threads of a warp exchange values.
#define LAUNCHER(kernel, exchanges)                                                                    \
  extern "C" bool launch_##kernel(unsigned blocks, unsigned threads, void** arguments, size_t count) { \
    return launch(kernel, exchanges, blocks, threads, arguments, count);                               \
  }
