// One step of an optimizer over states on the device, with the bits of the host's: [Note: one step] of
// csrc/optimizer/update_rules.h and the sequences that follow it there.
//
// Includes nothing, so that a compiler alone is enough: python/offload/_kernels.py puts float_formats.inl
// before it. It is to be compiled with --fmad=false --ftz=false --prec-div=true --prec-sqrt=true, as that
// does: then each operation below rounds to fp32 by itself, as the host's do. Compiled as C++ for a CPU it
// does the same; so the tests compare the two.

namespace {

// What one block works through; python/offload/_kernels.py makes the grid by it.
constexpr int kThreads = 256;
constexpr int kElementsPerThread = 4;

// A NaN becomes the quiet NaN without payload of its sign.
__device__ unsigned canonical_bits(float value) {
  const unsigned bits = __float_as_uint(value);
  return value != value ? (bits & 0x80000000u) | 0x7fc00000u : bits;
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
