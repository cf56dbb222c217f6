// How the moments of an optimizer are loaded and stored: [Note: small moments] in update_rules.h.
//
// Include after lanes.inl. A format works on groups of kGroup elements: load_pair and store_pair are called
// for all pairs of a group, then end_group for where it began. Its Block is what it keeps of a group until
// then.

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

// The random words of the elements.
struct RandomWords {
  ALWAYS_INLINE RandomWords(const UpdateSpan& span, uint32_t key)
      : first(static_cast<uint32_t>(span.first_element) + key) {}
  template <typename Order>
  ALWAYS_INLINE Pair<Words> of_pair(size_t at, Order order) const {
    const Pair<Words> counts = order.count_from(first + static_cast<uint32_t>(at));
    return {scrambled(counts.left), scrambled(counts.right)};
  }

  uint32_t first;
};

struct NoBlock {};

template <typename Rule>
struct Float32Moments {
  using Element = float;
  using Block = NoBlock;
  static constexpr bool kNarrow = false;
  static constexpr size_t kGroup = kStride;

  ALWAYS_INLINE Float32Moments(const UpdateSpan& span, uint32_t, Block&)
      : first(static_cast<float*>(span.exp_avg)), second(static_cast<float*>(span.exp_avg_sq)) {}

  ALWAYS_INLINE Pair<Moments> load_pair(size_t at, InHalves) const {
    Pair<Moments> moments = {};
    if (Rule::kHasExpAvg) {
      moments.left.first = load(first + at);
      moments.right.first = load(first + at + kLanes);
    }
    if (Rule::kHasExpAvgSq) {
      moments.left.second = load(second + at);
      moments.right.second = load(second + at + kLanes);
    }
    return moments;
  }
  ALWAYS_INLINE void store_pair(size_t at, const Pair<Moments>& moments, InHalves) const {
    if (Rule::kHasExpAvg) {
      store(moments.left.first, first + at);
      store(moments.right.first, first + at + kLanes);
    }
    if (Rule::kHasExpAvgSq) {
      store(moments.left.second, second + at);
      store(moments.right.second, second + at + kLanes);
    }
  }
  ALWAYS_INLINE void end_group(size_t, InHalves) const {}

  float *first, *second;
};

template <typename Rule>
struct BFloat16Moments {
  using Element = uint16_t;
  using Block = NoBlock;
  static constexpr bool kNarrow = true;
  static constexpr size_t kGroup = kStride;

  ALWAYS_INLINE BFloat16Moments(const UpdateSpan& span, uint32_t key, Block&)
      : first(static_cast<uint16_t*>(span.exp_avg)),
        second(static_cast<uint16_t*>(span.exp_avg_sq)),
        random(span, key) {}

  template <typename Order>
  ALWAYS_INLINE Pair<Moments> load_pair(size_t at, Order order) const {
    Pair<Moments> moments = {};
    if (Rule::kHasExpAvg) {
      const Pair<Floats> loaded = floats_of(order.load_upper(first + at));
      moments.left.first = loaded.left;
      moments.right.first = loaded.right;
    }
    if (Rule::kHasExpAvgSq) {
      const Pair<Floats> loaded = floats_of(order.load_upper(second + at));
      moments.left.second = loaded.left;
      moments.right.second = loaded.right;
    }
    return moments;
  }
  template <typename Order>
  ALWAYS_INLINE void store_pair(size_t at, const Pair<Moments>& moments, Order order) const {
    const Pair<Words> words = random.of_pair(at, order);
    if (Rule::kHasExpAvg) {
      order.store_upper({rounded_stochastically(canonical_bits(moments.left.first), words.left & 0xffffu),
                         rounded_stochastically(canonical_bits(moments.right.first), words.right & 0xffffu)},
                        first + at);
    }
    if (Rule::kHasExpAvgSq) {
      order.store_upper({rounded_stochastically(canonical_bits(moments.left.second), words.left >> 16),
                         rounded_stochastically(canonical_bits(moments.right.second), words.right >> 16)},
                        second + at);
    }
  }
  template <typename Order>
  ALWAYS_INLINE void end_group(size_t, Order) const {}

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
  // The 16 bits of `random` below bit kShift decide which neighbour; their half unit keeps a level that a
  // rounding error put a hair too low.
  static ALWAYS_INLINE Words encoded(Floats level, Words random) {
    const Words raise = (random & (0xffffu << (kShift - 16))) | ((1u << (kShift - 17)) - kOffsetBits);
    return smaller((bits_of(level + kOffset) + raise) >> kShift, broadcast(kTopCode));
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
  static constexpr bool kNarrow = true;
  static constexpr size_t kGroup = kMomentBlock;
  // What is to be stored, in fp32 until the scale is known.
  struct Block {
    alignas(64) float firsts[kMomentBlock], roots[kMomentBlock];
  };

  ALWAYS_INLINE Int8Moments(const UpdateSpan& span, uint32_t key, Block& scratch)
      : first(static_cast<uint8_t*>(span.exp_avg)),
        second(static_cast<uint8_t*>(span.exp_avg_sq)),
        first_scales(span.exp_avg_scales),
        second_scales(span.exp_avg_sq_scales),
        random(span, key),
        block(scratch) {}

  template <typename Order>
  ALWAYS_INLINE Pair<Moments> load_pair(size_t at, Order order) const {
    Pair<Moments> moments = {};
    if (Rule::kHasExpAvg) {
      const Pair<Words> codes = order.load_bytes(first + at);
      const float scale = first_scales[at / kMomentBlock];
      moments.left.first = decoded_first(codes.left, scale);
      moments.right.first = decoded_first(codes.right, scale);
    }
    if (Rule::kHasExpAvgSq) {
      const Pair<Words> codes = order.load_bytes(second + at);
      const float scale = second_scales[at / kMomentBlock];
      moments.left.second = decoded_second(codes.left, scale);
      moments.right.second = decoded_second(codes.right, scale);
    }
    return moments;
  }
  template <typename Order>
  ALWAYS_INLINE void store_pair(size_t at, const Pair<Moments>& moments, Order) {
    keep(at % kMomentBlock, moments.left);
    keep(at % kMomentBlock + kLanes, moments.right);
  }
  template <typename Order>
  ALWAYS_INLINE void end_group(size_t begin, Order order) {
    float to_first = 0, to_root = 0;
    if (Rule::kHasExpAvg) {
      float& scale = first_scales[begin / kMomentBlock];
      scale = FirstLevels::scale_of(largest_of(largest_first), kLeastFirst);
      to_first = reciprocal_of(scale);
    }
    if (Rule::kHasExpAvgSq) {
      float& scale = second_scales[begin / kMomentBlock];
      scale = RootLevels::scale_of(largest_of(largest_root), kLeastRoot);
      to_root = reciprocal_of(scale);
    }
    largest_first = largest_root = Words{};
    for (size_t at = 0; at < kMomentBlock; at += 2 * kPairLanes) {
      const Pair<Words> low = random.of_pair(begin + at, order);
      const Pair<Words> high = random.of_pair(begin + at + kPairLanes, order);
      if (Rule::kHasExpAvg) {
        order.store_bytes(first_codes(at, to_first, low), first_codes(at + kPairLanes, to_first, high),
                          first + begin + at);
      }
      if (Rule::kHasExpAvgSq) {
        order.store_bytes(root_codes(at, to_root, low), root_codes(at + kPairLanes, to_root, high),
                          second + begin + at);
      }
    }
  }

 private:
  static ALWAYS_INLINE Floats decoded_first(Words code, float scale) {
    const Floats magnitude = FirstLevels::decoded(code & 0x7fu) * scale;
    return floats_of(bits_of(magnitude) | ((code << 24) & 0x80000000u));
  }
  static ALWAYS_INLINE Floats decoded_second(Words code, float scale) {
    const Floats root = RootLevels::decoded(code) * scale;
    return root * root;
  }

  ALWAYS_INLINE void keep(size_t at, const Moments& moments) {
    if (Rule::kHasExpAvg) {
      store(moments.first, block.firsts + at);
      largest_first = larger(largest_first, bits_of(moments.first) & 0x7fffffffu);
    }
    if (Rule::kHasExpAvgSq) {
      store(moments.root, block.roots + at);
      largest_root =
          larger(largest_root, bits_of(moments.root));  // never -0; the sign of a NaN makes it larger
    }
  }

  ALWAYS_INLINE Words first_code(size_t at, float to_level, Words random_words) const {
    const Words value = bits_of(load(block.firsts + at));
    const Floats level = floats_of(value & 0x7fffffffu) * to_level;
    return FirstLevels::encoded(level, random_words << (FirstLevels::kShift - 16)) | ((value >> 24) & 0x80u);
  }
  ALWAYS_INLINE Pair<Words> first_codes(size_t at, float to_level, Pair<Words> random_words) const {
    return {first_code(at, to_level, random_words.left),
            first_code(at + kLanes, to_level, random_words.right)};
  }
  // Never zero for what is not: the step divides by it.
  ALWAYS_INLINE Words root_code(size_t at, float to_level, Words random_words) const {
    const Floats level = load(block.roots + at) * to_level;
    return larger(RootLevels::encoded(level, random_words >> (32 - RootLevels::kShift)),
                  smaller(bits_of(level), broadcast(1u)));
  }
  ALWAYS_INLINE Pair<Words> root_codes(size_t at, float to_level, Pair<Words> random_words) const {
    return {root_code(at, to_level, random_words.left), root_code(at + kLanes, to_level, random_words.right)};
  }

 public:
  uint8_t *first, *second;

 private:
  float *first_scales, *second_scales;
  RandomWords random;
  Block& block;
  Words largest_first = {}, largest_root = {};
};
