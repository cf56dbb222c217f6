// Activations rounded to a byte an element before they leave the device, and what comes back: lossy.
//
// [Note: activation formats] Blocks of 256 elements in a row share an fp32 scale; the last one may be
// shorter. Codes and scales are those of the fp32 value x:
//   int8  the nearest integer to x / scale, ties to even, from -126 to 126. The scale is the largest
//         magnitude over 126, cut to 16 significant bits: so code * scale is exact in fp32. 127 and -127
//         are the infinities, -128 is NaN.
//   fp8   E4M3 of x / scale as IEEE 754 would have it: 4 bits of exponent with bias 7, subnormals,
//         infinity 0x78, NaN 0x7f; to nearest even, at most 240. The scale is the power of two that takes
//         the largest magnitude to 128 or more and below 256.
// What is not finite counts for no scale and comes back as itself, NaN as the positive quiet one. A block
// whose largest is below 2^-100 comes back as zeros. What comes back is rounded to nearest even to its dtype.
// python/offload/_activation_format.py has the same in torch operations.
//
// Includes nothing, and is compiled as update.cu is: prelude.inl stands before it.

namespace {

// python/offload/_kernels.py makes the grid by these: a warp works through a block.
constexpr int kThreads = 256;
constexpr int kBlock = 256;
constexpr int kElementsPerLane = kBlock / kWarp;

constexpr unsigned kInfinity = 0x7f800000u;
constexpr float kLeast = 0x1p-100f;  // well above where a scale, or the reciprocal of one, is not normal

struct Int8 {
  // `largest` is at least kLeast.
  static __device__ float scale_of(float largest) {
    return __uint_as_float(__float_as_uint(largest / 126.0f) & 0xffffff00u);
  }
  static __device__ unsigned encode(unsigned bits, float to_level) {
    const unsigned magnitude = bits & 0x7fffffffu;
    if (magnitude > kInfinity) return 0x80u;
    if (magnitude == kInfinity) return bits >> 31 ? 0x81u : 0x7fu;
    const float level = __uint_as_float(bits) * to_level;
    // A unit in the last place of 1.5 * 2^23 is one: the sum is rounded as the level is to be.
    return (__float_as_uint(level + 0x1.8p23f) - __float_as_uint(0x1.8p23f)) & 0xffu;
  }
  static __device__ unsigned decode(unsigned code, float scale) {
    if (code == 0x80u) return 0x7fc00000u;
    if (code == 0x7fu || code == 0x81u) return kInfinity | (code & 0x80u) << 24;
    const int level = static_cast<int>(code) - (code & 0x80u ? 256 : 0);
    return __float_as_uint(static_cast<float>(level) * scale);
  }
};

struct Fp8 {
  static __device__ float scale_of(float largest) {
    return __uint_as_float((__float_as_uint(largest) & kInfinity) - (7u << 23));
  }
  static __device__ unsigned encode(unsigned bits, float to_level) {
    const unsigned sign = (bits >> 24) & 0x80u;
    if ((bits & 0x7fffffffu) >= kInfinity) return (bits & 0x7fffffffu) > kInfinity ? 0x7fu : sign | 0x78u;
    const unsigned level = __float_as_uint(__uint_as_float(bits & 0x7fffffffu) * to_level);
    if (level < 0x3c800000u)  // below 2^-6: in units of 2^-9, which is one in the last place of 2^14
      return sign | (__float_as_uint(__uint_as_float(level) + 0x1p14f) - __float_as_uint(0x1p14f));
    const unsigned rebiased = level - (120u << 23);  // bias 127 - 7
    const unsigned code = (rebiased + 0x7ffffu + ((rebiased >> 20) & 1u)) >> 20;
    return sign | (code < 0x77u ? code : 0x77u);
  }
  static __device__ unsigned decode(unsigned code, float scale) {
    const unsigned sign = (code & 0x80u) << 24, magnitude = code & 0x7fu;
    if (magnitude > 0x78u) return 0x7fc00000u;
    if (magnitude == 0x78u) return kInfinity | sign;
    const float level = magnitude < 8u ? static_cast<float>(magnitude) * 0x1p-9f
                                       : __uint_as_float((magnitude << 20) + (120u << 23));
    return __float_as_uint(level * scale) | sign;
  }
};

// The lanes of a warp take elements a warp apart, so that their accesses lie side by side.
__device__ long long block_of_warp() {
  return (blockIdx.x * static_cast<long long>(kThreads) + threadIdx.x) / kWarp;
}

template <typename Format>
__device__ void encode(const void* values, int format, unsigned char* codes, float* scales, long long count) {
  const long long block = block_of_warp();
  if (block * kBlock >= count) return;  // all lanes of a warp together
  const int lane = threadIdx.x % kWarp;
  unsigned bits[kElementsPerLane], largest = 0;
#pragma unroll
  for (int k = 0; k < kElementsPerLane; ++k) {
    const long long at = block * kBlock + k * kWarp + lane;
    bits[k] = at < count ? __float_as_uint(widen(load_bits(values, format, at), format)) : 0u;
    const unsigned magnitude = bits[k] & 0x7fffffffu;
    if (magnitude < kInfinity) largest = larger(largest, magnitude);
  }
  const float most = __uint_as_float(largest_of_warp(largest));
  const float scale = most < kLeast ? 0.0f : Format::scale_of(most);
  const float to_level = most < kLeast ? 0.0f : 1.0f / scale;
  if (lane == 0) scales[block] = scale;
#pragma unroll
  for (int k = 0; k < kElementsPerLane; ++k) {
    const long long at = block * kBlock + k * kWarp + lane;
    if (at < count) codes[at] = static_cast<unsigned char>(Format::encode(bits[k], to_level));
  }
}

// `bits` are those of an fp32 number, an infinity or the positive quiet NaN.
__device__ void store(unsigned bits, void* values, int format, long long at) {
  if (format == kFloat32) {
    static_cast<unsigned*>(values)[at] = bits;
    return;
  }
  const unsigned half = format == kBFloat16 ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16
                                            : float32_to_float16(__uint_as_float(bits));
  static_cast<unsigned short*>(values)[at] = static_cast<unsigned short>(half);
}

template <typename Format>
__device__ void decode(const unsigned char* codes, const float* scales, void* values, int format,
                       long long count) {
  const long long block = block_of_warp();
  if (block * kBlock >= count) return;
  const float scale = scales[block];
#pragma unroll
  for (int k = 0; k < kElementsPerLane; ++k) {
    const long long at = block * kBlock + k * kWarp + threadIdx.x % kWarp;
    if (at < count) store(Format::decode(codes[at], scale), values, format, at);
  }
}

}  // namespace

#define KERNEL extern "C" __global__ void __launch_bounds__(kThreads)

KERNEL encode_int8(const void* values, int format, unsigned char* codes, float* scales, long long count) {
  encode<Int8>(values, format, codes, scales, count);
}

KERNEL encode_fp8(const void* values, int format, unsigned char* codes, float* scales, long long count) {
  encode<Fp8>(values, format, codes, scales, count);
}

KERNEL decode_int8(const unsigned char* codes, const float* scales, void* values, int format,
                   long long count) {
  decode<Int8>(codes, scales, values, format, count);
}

KERNEL decode_fp8(const unsigned char* codes, const float* scales, void* values, int format,
                  long long count) {
  decode<Fp8>(codes, scales, values, format, count);
}
