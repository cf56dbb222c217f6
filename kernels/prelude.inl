// What every kernel begins with: python/offload/_kernels.py puts it before the source that it compiles.

namespace {

// FloatFormat of csrc/optimizer/update_rules.h.
enum FloatFormat { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

__device__ float float16_to_float32(unsigned half) {
  const unsigned sign = (half & 0x8000u) << 16;
  const unsigned magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u)
    return __uint_as_float(sign | ((magnitude << 13) + 0x70000000u));  // infinity, NaN
  if (magnitude >= 0x0400u)
    return __uint_as_float(sign | ((magnitude << 13) + 0x38000000u));  // bias 127 - 15
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;    // exact
  return __uint_as_float(sign | __float_as_uint(subnormal));
}

// To nearest even.
__device__ unsigned float32_to_float16(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned sign = (bits >> 16) & 0x8000u;
  const unsigned magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  if (magnitude >= 0x47800000u) return sign | 0x7c00u;  // 65536 and above
  if (magnitude >= 0x38800000u) {                       // normal: 2^-14 and above; may carry into infinity
    const unsigned rebiased = magnitude - 0x38000000u;
    return sign | ((rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13);
  }
  if (magnitude < 0x33000000u) return sign;  // below half of the smallest subnormal
  const unsigned shift = 126u - (magnitude >> 23);
  const unsigned significand = (magnitude & 0x7fffffu) | 0x800000u;
  const unsigned odd = (significand >> shift) & 1u;
  return sign | ((significand + (1u << (shift - 1)) - 1u + odd) >> shift);
}

// What an element of an array has in memory, and its value.
__device__ unsigned load_bits(const void* array, int format, long long at) {
  return format == kFloat32 ? static_cast<const unsigned*>(array)[at]
                            : static_cast<const unsigned short*>(array)[at];
}
__device__ float widen(unsigned bits, int format) {
  return format == kFloat16 ? float16_to_float32(bits)
                            : __uint_as_float(format == kBFloat16 ? bits << 16 : bits);
}

// Threads that take each step together; all of a warp are in the same call.
constexpr int kWarp = 32;

__device__ unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }

// Of all lanes.
__device__ unsigned largest_of_warp(unsigned value) {
  for (int apart = kWarp / 2; apart > 0; apart /= 2)
    value = larger(value, __shfl_xor_sync(0xffffffffu, value, apart));
  return value;
}

}  // namespace
