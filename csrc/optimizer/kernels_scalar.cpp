// The kernels for the baseline of the architecture: SSE2 on x86-64, Advanced SIMD on aarch64.
#if defined(__x86_64__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "optimizer/update_kernels.h"

namespace offload {
namespace {

#include "optimizer/float_formats.inl"

constexpr size_t kLanes = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

inline Floats square_root(Floats value) {
#if defined(__x86_64__)
  return _mm_sqrt_ps(value);
#elif defined(__aarch64__)
  return vsqrtq_f32(value);
#else
  for (size_t i = 0; i < kLanes; ++i) value[i] = __builtin_sqrtf(value[i]);
  return value;
#endif
}

template <typename Element>
inline Words widen(const Element* from) {
  return Words{from[0], from[1], from[2], from[3]};
}

template <typename Element>
inline void narrow(Words low, Words high, Element* to) {
  for (size_t i = 0; i < kLanes; ++i) {
    to[i] = static_cast<Element>(low[i]);
    to[kLanes + i] = static_cast<Element>(high[i]);
  }
}

inline Floats load_float16(const uint16_t* from) {
  Words bits;
  for (size_t i = 0; i < kLanes; ++i) bits[i] = float16_to_float32(from[i]);
  return reinterpret_cast<Floats>(bits);
}

inline Words to_float16(Floats value) {
  Words halves = reinterpret_cast<Words>(value);
  for (size_t i = 0; i < kLanes; ++i) halves[i] = float32_to_float16(halves[i]);
  return halves;
}

inline Floats round_to_float16(Floats value) {
  Words bits = to_float16(value);
  for (size_t i = 0; i < kLanes; ++i) bits[i] = float16_to_float32(bits[i]);
  return reinterpret_cast<Floats>(bits);
}

inline void store_float16(Floats low, Floats high, uint16_t* to) {
  narrow(to_float16(low), to_float16(high), to);
}

#include "optimizer/lanes.inl"
#include "optimizer/moment_formats.inl"
#include "optimizer/update_body.inl"
#include "optimizer/update_rules.inl"

}  // namespace

const UpdateKernels kernels_scalar = {update<AdamW>, update<Lion>, update<Adagrad>};

}  // namespace offload
