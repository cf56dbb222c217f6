// One step of an optimizer over states on the device, with the bits of the host's: [Note: one step] of
// csrc/optimizer/update_rules.h and the sequences that follow it there.
//
// Includes nothing, so that a compiler alone is enough. It is to be compiled with --fmad=false --ftz=false
// --prec-div=true --prec-sqrt=true (python/offload/_kernels.py does): then each operation below rounds to
// fp32 by itself, as the host's do. Compiled as C++ for a CPU it does the same; so the tests compare the two.

namespace {

// What one block works through; python/offload/_kernels.py makes the grid by it.
constexpr int kThreads = 256;
constexpr int kElementsPerThread = 4;

// FloatFormat of csrc/optimizer/update_rules.h.
enum FloatFormat { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A NaN becomes the quiet NaN without payload of its sign.
__device__ unsigned canonical_bits(float value) {
  const unsigned bits = __float_as_uint(value);
  return value != value ? (bits & 0x80000000u) | 0x7fc00000u : bits;
}

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

// What an element of a gradient has in memory, and its value.
__device__ unsigned load_bits(const void* gradient, int format, long long at) {
  return format == kFloat32 ? static_cast<const unsigned*>(gradient)[at]
                            : static_cast<const unsigned short*>(gradient)[at];
}
__device__ float widen(unsigned bits, int format) {
  return format == kFloat16 ? float16_to_float32(bits)
                            : __uint_as_float(format == kBFloat16 ? bits << 16 : bits);
}

// bf16 is rounded half up in magnitude.
__device__ void store_weight(float master, void* weight, int format, long long at) {
  if (format == kFloat32) return;  // the master is the weight
  const unsigned rounded =
      format == kBFloat16 ? (canonical_bits(master) + 0x8000u) >> 16 : float32_to_float16(master);
  static_cast<unsigned short*>(weight)[at] = static_cast<unsigned short>(rounded);
}

// The lines of each optimizer: update() changes the weight and the moments that its kHas constants name.

struct AdamW {
  static constexpr bool kHasExpAvg = true, kHasExpAvgSq = true;
  float weight_scale, l2, one_minus_beta1, beta2, one_minus_beta2, step_size, eps;

  __device__ void update(float gradient, float& weight, float& exp_avg, float& exp_avg_sq) const {
    if (l2 != 0) {
      gradient = gradient + l2 * weight;
    } else {
      weight = weight * weight_scale;
    }
    exp_avg = exp_avg + (gradient - exp_avg) * one_minus_beta1;
    exp_avg_sq = exp_avg_sq * beta2 + (one_minus_beta2 * gradient) * gradient;
    weight = weight - (step_size * exp_avg) / (sqrtf(exp_avg_sq) + eps);
  }
};

struct Lion {
  static constexpr bool kHasExpAvg = true, kHasExpAvgSq = false;
  float weight_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size;

  __device__ void update(float gradient, float& weight, float& exp_avg, float&) const {
    const float direction = exp_avg * beta1 + gradient * one_minus_beta1;
    exp_avg = exp_avg * beta2 + gradient * one_minus_beta2;
    const float step = direction > 0 ? step_size : direction < 0 ? -step_size : 0;
    weight = weight * weight_scale - step;
  }
};

struct Adagrad {
  static constexpr bool kHasExpAvg = false, kHasExpAvgSq = true;
  float l2, step_size, eps;

  __device__ void update(float gradient, float& weight, float&, float& sum) const {
    if (l2 != 0) gradient = gradient + l2 * weight;
    sum = sum + gradient * gradient;
    weight = weight - (step_size * gradient) / (sqrtf(sum) + eps);
  }
};

// `count` elements each. No two arrays may overlap, and none needs an alignment beyond its elements'.
struct Arrays {
  const void* gradient;  // in gradient_format
  float* master;
  void* weight;       // in weight_format; not touched when that is kFloat32
  float* exp_avg;     // not touched unless Rule::kHasExpAvg
  float* exp_avg_sq;  // not touched unless Rule::kHasExpAvgSq
  long long count;
  int gradient_format, weight_format;
  float grad_scale;  // multiplies the widened gradient, in fp32
  bool maximize;
};

template <typename Rule>
__device__ void update(const Arrays& arrays, const Rule& rule) {
  const long long first = blockIdx.x * static_cast<long long>(kThreads * kElementsPerThread) + threadIdx.x;
  const float scale = arrays.maximize ? -arrays.grad_scale : arrays.grad_scale;  // the sign is exact
  // Not unrolled: few registers let as many threads as a multiprocessor holds hide the memory's latency, and
  // the compiler would make a copy of the loop for every mixture of formats.
#pragma unroll 1
  for (int k = 0; k < kElementsPerThread; ++k) {
    const long long at = first + k * kThreads;
    if (at >= arrays.count) return;
    const unsigned bits = load_bits(arrays.gradient, arrays.gradient_format, at);
    float master = arrays.master[at];
    float exp_avg = Rule::kHasExpAvg ? arrays.exp_avg[at] : 0;
    float exp_avg_sq = Rule::kHasExpAvgSq ? arrays.exp_avg_sq[at] : 0;
    rule.update(widen(bits, arrays.gradient_format) * scale, master, exp_avg, exp_avg_sq);
    arrays.master[at] = master;
    if (Rule::kHasExpAvg) arrays.exp_avg[at] = exp_avg;
    if (Rule::kHasExpAvgSq) arrays.exp_avg_sq[at] = exp_avg_sq;
    store_weight(master, arrays.weight, arrays.weight_format, at);
  }
}

}  // namespace

#define KERNEL extern "C" __global__ void __launch_bounds__(kThreads)

KERNEL adamw(const void* gradient, int gradient_format, float* master, void* weight, int weight_format,
             float* exp_avg, float* exp_avg_sq, long long count, float grad_scale, bool maximize,
             float weight_scale, float l2, float one_minus_beta1, float beta2, float one_minus_beta2,
             float step_size, float eps) {
  update(Arrays{gradient, master, weight, exp_avg, exp_avg_sq, count, gradient_format, weight_format,
                grad_scale, maximize},
         AdamW{weight_scale, l2, one_minus_beta1, beta2, one_minus_beta2, step_size, eps});
}

KERNEL lion(const void* gradient, int gradient_format, float* master, void* weight, int weight_format,
            float* exp_avg, float* exp_avg_sq, long long count, float grad_scale, bool maximize,
            float weight_scale, float beta1, float one_minus_beta1, float beta2, float one_minus_beta2,
            float step_size) {
  update(Arrays{gradient, master, weight, exp_avg, exp_avg_sq, count, gradient_format, weight_format,
                grad_scale, maximize},
         Lion{weight_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size});
}

KERNEL adagrad(const void* gradient, int gradient_format, float* master, void* weight, int weight_format,
               float* exp_avg, float* exp_avg_sq, long long count, float grad_scale, bool maximize, float l2,
               float step_size, float eps) {
  update(Arrays{gradient, master, weight, exp_avg, exp_avg_sq, count, gradient_format, weight_format,
                grad_scale, maximize},
         Adagrad{l2, step_size, eps});
}
