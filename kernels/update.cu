// One step of an optimizer over states on the device, with the bits of the host's: [Note: one step] of
// csrc/optimizer/update_rules.h and the sequences that follow it there.
//
// Includes nothing, so that a compiler alone is enough: python/offload/_kernels.py puts prelude.inl before
// it. To be compiled with --fmad=false --ftz=false --prec-div=true --prec-sqrt=true, as that does: then each
// operation below rounds to fp32 by itself, as the host's do. Compiled as C++ for a CPU it does the same; so
// the tests compare the two.

namespace {

// python/offload/_kernels.py makes the grid by these: a thread works through a few elements, or a warp
// through a block of int8 moments.
constexpr int kThreads = 256;
constexpr int kElementsPerThread = 4;
constexpr int kMomentBlock = 256;  // of csrc/optimizer/update_rules.h
constexpr int kElementsPerLane = kMomentBlock / kWarp;

// A master_format beside those of prelude.inl: MasterFormat::kSplit of csrc/optimizer/update_rules.h.
constexpr int kSplit = 3;

// A NaN becomes the quiet NaN without payload of its sign.
__device__ unsigned canonical_bits(float value) {
  const unsigned bits = __float_as_uint(value);
  return value != value ? (bits & 0x80000000u) | 0x7fc00000u : bits;
}

// What a 16-bit weight becomes; bf16 is rounded half up in magnitude.
__device__ unsigned rounded_weight(float master, int format) {
  return format == kBFloat16 ? (canonical_bits(master) + 0x8000u) >> 16 : float32_to_float16(master);
}

__device__ void store_bits(unsigned bits, void* array, int format, long long at) {
  if (format == kFloat32) {
    static_cast<unsigned*>(array)[at] = bits;
  } else {
    static_cast<unsigned short*>(array)[at] = static_cast<unsigned short>(bits);
  }
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

// `count` elements each. No two arrays may overlap, and none needs an alignment beyond its elements'. Any may
// lie in memory of the host that the device reaches at the same address.
struct Arrays {
  const void* gradient;   // in gradient_format
  void* master;           // in master_format: kFloat32, the remainders of kSplit, or kBFloat16 of a weight
                          // that is its own
  void* weight;           // in weight_format; not touched where the master is the weight. Read for kSplit
  void* copy;             // written too: what the weight became, in weight_format; null: nothing
  void* exp_avg;          // not touched unless Rule::kHasExpAvg
  void* exp_avg_sq;       // not touched unless Rule::kHasExpAvgSq
  float* exp_avg_scales;  // of int8 moments: one for each kMomentBlock elements
  float* exp_avg_sq_scales;
  long long count;
  int gradient_format, master_format, weight_format;
  unsigned rounding_key;       // [Note: stochastic rounding] of csrc/optimizer/update_rules.h
  const float* grad_scale_at;  // what multiplies the widened gradient, in fp32; null: grad_scale does
  float grad_scale;
  bool maximize;
};

// scrambled() of csrc/optimizer/float_formats.inl.
__device__ unsigned scrambled(unsigned word) {
  word = (word ^ (word >> 16)) * 0x7feb352du;
  word = (word ^ (word >> 15)) * 0x846ca68bu;
  return word ^ (word >> 16);
}
__device__ unsigned random_word(unsigned key, long long at) {
  return scrambled(static_cast<unsigned>(at) + key);
}
// `random` is below 2^16.
__device__ unsigned short to_bfloat16_stochastic(float value, unsigned random) {
  return static_cast<unsigned short>((canonical_bits(value) + random) >> 16);
}

// Steps element `at`, all but the storing of its moments.
template <typename Rule>
__device__ void update_element(const Arrays& arrays, const Rule& rule, long long at, float& exp_avg,
                               float& exp_avg_sq) {
  const float given = arrays.grad_scale_at != nullptr ? *arrays.grad_scale_at : arrays.grad_scale;
  const float scale = arrays.maximize ? -given : given;  // the sign is exact
  const unsigned bits = load_bits(arrays.gradient, arrays.gradient_format, at);
  float master;
  if (arrays.master_format == kSplit) {
    const unsigned upper = load_bits(arrays.weight, kBFloat16, at);
    master = __uint_as_float((upper << 16) + static_cast<const short*>(arrays.master)[at]);
  } else {
    master = widen(load_bits(arrays.master, arrays.master_format, at), arrays.master_format);
  }
  rule.update(widen(bits, arrays.gradient_format) * scale, master, exp_avg, exp_avg_sq);
  unsigned weight;
  if (arrays.master_format == kBFloat16) {
    const unsigned random = random_word(scrambled(arrays.rounding_key), at);
    weight = to_bfloat16_stochastic(master, random & 0xffffu);
    store_bits(weight, arrays.master, kBFloat16, at);
  } else {
    const bool is_weight = arrays.weight_format == kFloat32;
    weight = is_weight ? __float_as_uint(master) : rounded_weight(master, arrays.weight_format);
    // Of a split one the lower half, read as a signed number, is what the rounding left out.
    if (arrays.master_format == kSplit) {
      store_bits(canonical_bits(master), arrays.master, kBFloat16, at);
    } else {
      static_cast<float*>(arrays.master)[at] = master;
    }
    if (!is_weight) store_bits(weight, arrays.weight, arrays.weight_format, at);
  }
  if (arrays.copy != nullptr) store_bits(weight, arrays.copy, arrays.weight_format, at);
}

// Moments that an element has to itself: `random` is of it and the moment.
struct Float32Moments {
  static constexpr bool kIsRounded = false;
  static __device__ float load(const void* moment, long long at) {
    return static_cast<const float*>(moment)[at];
  }
  static __device__ void store(float value, void* moment, long long at, unsigned) {
    static_cast<float*>(moment)[at] = value;
  }
};
struct BFloat16Moments {
  static constexpr bool kIsRounded = true;
  static __device__ float load(const void* moment, long long at) {
    return widen(load_bits(moment, kBFloat16, at), kBFloat16);
  }
  static __device__ void store(float value, void* moment, long long at, unsigned random) {
    static_cast<unsigned short*>(moment)[at] = to_bfloat16_stochastic(value, random);
  }
};

template <typename Moments, typename Rule>
__device__ void update(const Arrays& arrays, const Rule& rule) {
  const long long first = blockIdx.x * static_cast<long long>(kThreads * kElementsPerThread) + threadIdx.x;
  // Not unrolled: few registers let as many threads as a multiprocessor holds hide the memory's latency, and
  // the compiler would make a copy of the loop for every mixture of formats.
#pragma unroll 1
  for (int k = 0; k < kElementsPerThread; ++k) {
    const long long at = first + k * kThreads;
    if (at >= arrays.count) return;
    float exp_avg = Rule::kHasExpAvg ? Moments::load(arrays.exp_avg, at) : 0;
    float exp_avg_sq = Rule::kHasExpAvgSq ? Moments::load(arrays.exp_avg_sq, at) : 0;
    update_element(arrays, rule, at, exp_avg, exp_avg_sq);
    const unsigned random = Moments::kIsRounded ? random_word(arrays.rounding_key, at) : 0;
    if (Rule::kHasExpAvg) Moments::store(exp_avg, arrays.exp_avg, at, random & 0xffffu);
    if (Rule::kHasExpAvgSq) Moments::store(exp_avg_sq, arrays.exp_avg_sq, at, random >> 16);
  }
}

// The levels of an 8-bit code with kMantissaBits, of which kTopCode is the largest: [Note: small moments] of
// csrc/optimizer/update_rules.h. Blocks whose largest is below 2^-kLeastExponent are zero.
template <unsigned kMantissaBits, unsigned kTopCode, unsigned kLeastExponent>
struct Levels {
  static constexpr unsigned kShift = 23 - kMantissaBits;
  static constexpr float kOffset = 1u << kMantissaBits;
  static constexpr unsigned kOffsetBits = (127 + kMantissaBits) << 23;

  static __device__ float decoded(unsigned code) {
    return __uint_as_float((code << kShift) + kOffsetBits) - kOffset;
  }
  // `random`, below 2^16, decides which neighbour.
  static __device__ unsigned encoded(float level, unsigned random) {
    const unsigned raised = (random << (kShift - 16)) + ((1u << (kShift - 17)) - kOffsetBits);
    const unsigned code = (__float_as_uint(level + kOffset) + raised) >> kShift;
    return code < kTopCode ? code : kTopCode;
  }
  static __device__ float scale_of(unsigned largest_bits) {
    if (largest_bits >= 0x7f800000u) return __uint_as_float(0x7fc00000u);
    if (largest_bits < (127 - kLeastExponent) << 23) return 0;
    return __uint_as_float(__float_as_uint(__uint_as_float(largest_bits) / decoded(kTopCode)) & 0xffffff00u);
  }
};
using FirstLevels = Levels<4, 127, 100>;
using RootLevels = Levels<5, 255, 50>;

__device__ float reciprocal_of(float scale) { return scale > 0 ? 1 / scale : 0; }  // 0 of NaN

// Moments of a byte an element: a warp works through a block, and keeps what is stored in fp32 until the
// block's scale is known; in shared memory, of which a thread reads what it wrote, as registers would take a
// copy of the loop's body for each element. Beyond the end are zeros, which change no scale.
template <typename Rule>
__device__ void update_int8(const Arrays& arrays, const Rule& rule) {
  __shared__ float exp_avgs[Rule::kHasExpAvg ? kElementsPerLane : 1][kThreads];
  __shared__ float roots[Rule::kHasExpAvgSq ? kElementsPerLane : 1][kThreads];
  const unsigned thread = threadIdx.x;
  const long long block = (blockIdx.x * static_cast<long long>(kThreads) + thread) / kWarp;
  if (block * kMomentBlock >= arrays.count) return;  // all lanes of a warp together
  const long long first = block * kMomentBlock + thread % kWarp;
  unsigned char* const first_codes = static_cast<unsigned char*>(arrays.exp_avg);
  unsigned char* const root_codes = static_cast<unsigned char*>(arrays.exp_avg_sq);
  float first_scale = Rule::kHasExpAvg ? arrays.exp_avg_scales[block] : 0;
  float root_scale = Rule::kHasExpAvgSq ? arrays.exp_avg_sq_scales[block] : 0;

  unsigned largest_first = 0, largest_root = 0;
#pragma unroll 1
  for (int k = 0; k < kElementsPerLane; ++k) {
    const long long at = first + k * kWarp;
    if (at >= arrays.count) break;
    float exp_avg = 0, exp_avg_sq = 0;
    if (Rule::kHasExpAvg) {
      const unsigned code = first_codes[at];
      const float magnitude = FirstLevels::decoded(code & 0x7fu) * first_scale;
      exp_avg = __uint_as_float(__float_as_uint(magnitude) | (code & 0x80u) << 24);
    }
    if (Rule::kHasExpAvgSq) {
      const float root = RootLevels::decoded(root_codes[at]) * root_scale;
      exp_avg_sq = root * root;
    }
    update_element(arrays, rule, at, exp_avg, exp_avg_sq);
    if (Rule::kHasExpAvg) {
      exp_avgs[k][thread] = exp_avg;
      largest_first = larger(largest_first, __float_as_uint(exp_avg) & 0x7fffffffu);
    }
    if (Rule::kHasExpAvgSq) {
      const float root = sqrtf(exp_avg_sq);
      roots[k][thread] = root;
      largest_root = larger(largest_root, __float_as_uint(root) & 0x7fffffffu);
    }
  }

  if (Rule::kHasExpAvg) first_scale = FirstLevels::scale_of(largest_of_warp(largest_first));
  if (Rule::kHasExpAvgSq) root_scale = RootLevels::scale_of(largest_of_warp(largest_root));
  if (thread % kWarp == 0) {
    if (Rule::kHasExpAvg) arrays.exp_avg_scales[block] = first_scale;
    if (Rule::kHasExpAvgSq) arrays.exp_avg_sq_scales[block] = root_scale;
  }
  const float to_first = reciprocal_of(first_scale), to_root = reciprocal_of(root_scale);
#pragma unroll 1
  for (int k = 0; k < kElementsPerLane; ++k) {
    const long long at = first + k * kWarp;
    if (at >= arrays.count) break;
    const unsigned random = random_word(arrays.rounding_key, at);
    if (Rule::kHasExpAvg) {
      const unsigned bits = __float_as_uint(exp_avgs[k][thread]);
      const float level = __uint_as_float(bits & 0x7fffffffu) * to_first;
      const unsigned code = FirstLevels::encoded(level, random & 0xffffu) | ((bits >> 24) & 0x80u);
      first_codes[at] = static_cast<unsigned char>(code);
    }
    if (Rule::kHasExpAvgSq) {
      const float level = roots[k][thread] * to_root;
      const unsigned code = RootLevels::encoded(level, random >> 16);
      // Never zero for what is not: the step divides by it.
      root_codes[at] = static_cast<unsigned char>(code == 0 && __float_as_uint(level) != 0 ? 1 : code);
    }
  }
}

}  // namespace

#define KERNEL extern "C" __global__ void __launch_bounds__(kThreads)
#define ARRAYS                                                                                      \
  const void *gradient, int gradient_format, void *master, int master_format, void *weight,         \
      int weight_format, void *copy, void *exp_avg, void *exp_avg_sq, float *exp_avg_scales,        \
      float *exp_avg_sq_scales, unsigned rounding_key, long long count, const float *grad_scale_at, \
      float grad_scale, bool maximize
#define THE_ARRAYS                                                                                       \
  Arrays {                                                                                               \
    gradient, master, weight, copy, exp_avg, exp_avg_sq, exp_avg_scales, exp_avg_sq_scales, count,       \
        gradient_format, master_format, weight_format, rounding_key, grad_scale_at, grad_scale, maximize \
  }

#define ADAMW                                                                                               \
  float weight_scale, float l2, float one_minus_beta1, float beta2, float one_minus_beta2, float step_size, \
      float eps
#define THE_ADAMW \
  AdamW { weight_scale, l2, one_minus_beta1, beta2, one_minus_beta2, step_size, eps }
KERNEL adamw(ARRAYS, ADAMW) { update<Float32Moments>(THE_ARRAYS, THE_ADAMW); }
KERNEL adamw_bf16(ARRAYS, ADAMW) { update<BFloat16Moments>(THE_ARRAYS, THE_ADAMW); }
KERNEL adamw_int8(ARRAYS, ADAMW) { update_int8(THE_ARRAYS, THE_ADAMW); }

#define LION \
  float weight_scale, float beta1, float one_minus_beta1, float beta2, float one_minus_beta2, float step_size
#define THE_LION \
  Lion { weight_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size }
KERNEL lion(ARRAYS, LION) { update<Float32Moments>(THE_ARRAYS, THE_LION); }
KERNEL lion_bf16(ARRAYS, LION) { update<BFloat16Moments>(THE_ARRAYS, THE_LION); }
KERNEL lion_int8(ARRAYS, LION) { update_int8(THE_ARRAYS, THE_LION); }

KERNEL adagrad(ARRAYS, float l2, float step_size, float eps) {
  update<Float32Moments>(THE_ARRAYS, Adagrad{l2, step_size, eps});
}
