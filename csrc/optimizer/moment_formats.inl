// How the moments of an optimizer are loaded and stored: [Note: small moments] in update_rules.h.
//
// Include after lanes.inl. A format works on groups of kGroup elements. `Format<Rule>(span, at, key)` begins
// the group at element `at`; load and store_pair are called for all of its elements, and finish once at its
// end.

// Of one vector of elements. `root` is the square root of `second`, which the optimizer has computed anyway.
struct Moments {
  Floats first, second, root;
};

// Elements between two rounds of prefetch: two cache lines of fp32, one of 16 bits. Larger bursts were
// slower.
constexpr size_t kStride = 32;
static_assert(kStride % kPairLanes == 0);
// How far ahead, in elements: 1-2 KiB of each array hides the latency of DRAM behind the square root
// and the division; the hardware's prefetcher alone costs up to 15 % in the narrow formats, nothing in fp32.
constexpr size_t kPrefetchAhead = 512;
constexpr size_t kCacheLineBytes = 64;

// Addresses beyond the end are fine: a prefetch never faults.
template <typename Element>
ALWAYS_INLINE void prefetch_stride(const Element* array, size_t at) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(array) + (at + kPrefetchAhead) * sizeof(Element);
  for (size_t byte = 0; byte < kStride * sizeof(Element); byte += kCacheLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + byte));
  }
}

inline uint32_t rounding_key(uint32_t seed, uint32_t step) { return scrambled(seed + scrambled(step)); }

// The random words of the elements from `at` on.
struct RandomWords {
  ALWAYS_INLINE RandomWords(const UpdateSpan& span, uint32_t key)
      : first(static_cast<uint32_t>(span.first_element) + key) {}
  ALWAYS_INLINE Words from(size_t at) const {
    return scrambled(count_from(first + static_cast<uint32_t>(at)));
  }

  uint32_t first;
};

template <typename Rule>
struct Float32Moments {
  using Element = float;
  static constexpr size_t kGroup = kStride;

  ALWAYS_INLINE Float32Moments(const UpdateSpan& span, size_t, uint32_t)
      : first(static_cast<float*>(span.exp_avg)), second(static_cast<float*>(span.exp_avg_sq)) {}

  ALWAYS_INLINE Moments load(size_t at) const {
    Moments moments = {};
    if (Rule::kHasExpAvg) moments.first = ::offload::load(first + at);
    if (Rule::kHasExpAvgSq) moments.second = ::offload::load(second + at);
    return moments;
  }
  ALWAYS_INLINE void store_pair(size_t at, const Moments& low, const Moments& high) const {
    if (Rule::kHasExpAvg) {
      store(low.first, first + at);
      store(high.first, first + at + kLanes);
    }
    if (Rule::kHasExpAvgSq) {
      store(low.second, second + at);
      store(high.second, second + at + kLanes);
    }
  }
  ALWAYS_INLINE void finish() const {}

  float *first, *second;
};

template <typename Rule>
struct BFloat16Moments {
  using Element = uint16_t;
  static constexpr size_t kGroup = kStride;

  ALWAYS_INLINE BFloat16Moments(const UpdateSpan& span, size_t, uint32_t key)
      : first(static_cast<uint16_t*>(span.exp_avg)),
        second(static_cast<uint16_t*>(span.exp_avg_sq)),
        random(span, key) {}

  ALWAYS_INLINE Moments load(size_t at) const {
    Moments moments = {};
    if (Rule::kHasExpAvg) moments.first = floats_of(widen(first + at) << 16);
    if (Rule::kHasExpAvgSq) moments.second = floats_of(widen(second + at) << 16);
    return moments;
  }
  ALWAYS_INLINE void store_pair(size_t at, const Moments& low, const Moments& high) const {
    const Words low_random = random.from(at), high_random = random.from(at + kLanes);
    if (Rule::kHasExpAvg) {
      narrow(to_bfloat16_stochastic(canonical_bits(low.first), low_random & 0xffffu),
             to_bfloat16_stochastic(canonical_bits(high.first), high_random & 0xffffu), first + at);
    }
    if (Rule::kHasExpAvgSq) {
      narrow(to_bfloat16_stochastic(canonical_bits(low.second), low_random >> 16),
             to_bfloat16_stochastic(canonical_bits(high.second), high_random >> 16), second + at);
    }
  }
  ALWAYS_INLINE void finish() const {}

  uint16_t *first, *second;
  RandomWords random;
};

// The levels of an 8-bit code with kMantissaBits, of which kTopCode is the largest.
template <unsigned kMantissaBits, uint32_t kTopCode>
struct Levels {
  static constexpr unsigned kShift = 23 - kMantissaBits;
  static constexpr float kOffset = 1u << kMantissaBits;
  static constexpr uint32_t kOffsetBits = (127 + kMantissaBits) << 23;
  static constexpr float kTop = __builtin_bit_cast(float, kOffsetBits + (kTopCode << kShift)) - kOffset;

  static ALWAYS_INLINE Floats decoded(Words code) {
    return floats_of((code << kShift) + kOffsetBits) - kOffset;
  }
  // `random`, below 2^16, decides which neighbour; its half unit keeps a level that a rounding error put a
  // hair too low.
  static ALWAYS_INLINE Words encoded(Floats level, Words random) {
    const Words raised = (random << (kShift - 16)) + ((1u << (kShift - 17)) - kOffsetBits);
    return smaller((bits_of(level + kOffset) + raised) >> kShift, broadcast(kTopCode));
  }

  // The scale of a block whose largest magnitude has these bits.
  static float scale_of(uint32_t largest_bits, float least) {
    if (largest_bits >= 0x7f800000u) return __builtin_nanf("");
    const float largest = __builtin_bit_cast(float, largest_bits);
    if (largest < least) return 0;
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, largest / kTop) & 0xffffff00u);
  }
};
using FirstLevels = Levels<4, 127>;
using RootLevels = Levels<5, 255>;
// Below them a block is zero: well above where its scale, or the square of its smallest root, would be
// denormal.
constexpr float kLeastFirst = 0x1p-100f, kLeastRoot = 0x1p-50f;

inline float reciprocal_of(float scale) { return scale > 0 ? 1 / scale : 0; }  // 0 of NaN

inline uint32_t largest_of(Words words) {
  uint32_t largest = 0;
  for (size_t i = 0; i < kLanes; ++i) largest = words[i] > largest ? words[i] : largest;
  return largest;
}

template <typename Rule>
struct Int8Moments {
  using Element = uint8_t;
  static constexpr size_t kGroup = kMomentBlock;

  ALWAYS_INLINE Int8Moments(const UpdateSpan& span, size_t at, uint32_t key) : begin(at), random(span, key) {
    if (Rule::kHasExpAvg) {
      first = static_cast<uint8_t*>(span.exp_avg);
      first_scale = span.exp_avg_scales + at / kMomentBlock;
    }
    if (Rule::kHasExpAvgSq) {
      second = static_cast<uint8_t*>(span.exp_avg_sq);
      second_scale = span.exp_avg_sq_scales + at / kMomentBlock;
    }
  }

  ALWAYS_INLINE Moments load(size_t at) const {
    Moments moments = {};
    if (Rule::kHasExpAvg) {
      const Words code = widen(first + at);
      const Floats magnitude = FirstLevels::decoded(code & 0x7fu) * *first_scale;
      moments.first = floats_of(bits_of(magnitude) | ((code & 0x80u) << 24));
    }
    if (Rule::kHasExpAvgSq) {
      const Floats root = RootLevels::decoded(widen(second + at)) * *second_scale;
      moments.second = root * root;
    }
    return moments;
  }
  // What is stored is kept in fp32 until the block's scale is known.
  ALWAYS_INLINE void store_pair(size_t at, const Moments& low, const Moments& high) {
    keep(at - begin, low);
    keep(at - begin + kLanes, high);
  }
  ALWAYS_INLINE void finish() {
    float to_first = 0, to_root = 0;
    if (Rule::kHasExpAvg) {
      *first_scale = FirstLevels::scale_of(largest_of(largest_first), kLeastFirst);
      to_first = reciprocal_of(*first_scale);
    }
    if (Rule::kHasExpAvgSq) {
      *second_scale = RootLevels::scale_of(largest_of(largest_root), kLeastRoot);
      to_root = reciprocal_of(*second_scale);
    }
    for (size_t at = 0; at < kMomentBlock; at += kPairLanes) {
      const Words low_random = random.from(begin + at), high_random = random.from(begin + at + kLanes);
      if (Rule::kHasExpAvg) {
        narrow(first_code(at, to_first, low_random), first_code(at + kLanes, to_first, high_random),
               first + begin + at);
      }
      if (Rule::kHasExpAvgSq) {
        narrow(root_code(at, to_root, low_random), root_code(at + kLanes, to_root, high_random),
               second + begin + at);
      }
    }
  }

 private:
  ALWAYS_INLINE void keep(size_t at, const Moments& moments) {
    if (Rule::kHasExpAvg) {
      store(moments.first, firsts + at);
      largest_first = larger(largest_first, bits_of(moments.first) & 0x7fffffffu);
    }
    if (Rule::kHasExpAvgSq) {
      store(moments.root, roots + at);
      largest_root = larger(largest_root, bits_of(moments.root) & 0x7fffffffu);
    }
  }
  ALWAYS_INLINE Words first_code(size_t at, float to_level, Words random_words) const {
    const Words value = bits_of(::offload::load(firsts + at));
    const Floats level = floats_of(value & 0x7fffffffu) * to_level;
    return FirstLevels::encoded(level, random_words & 0xffffu) | ((value >> 24) & 0x80u);
  }
  // Never zero for what is not: the step divides by it.
  ALWAYS_INLINE Words root_code(size_t at, float to_level, Words random_words) const {
    const Floats level = ::offload::load(roots + at) * to_level;
    return larger(RootLevels::encoded(level, random_words >> 16), smaller(bits_of(level), broadcast(1u)));
  }

 public:
  uint8_t *first = nullptr, *second = nullptr;

 private:
  size_t begin;
  RandomWords random;
  float *first_scale = nullptr, *second_scale = nullptr;
  Words largest_first = {}, largest_root = {};
  alignas(64) float firsts[kMomentBlock], roots[kMomentBlock];
};
