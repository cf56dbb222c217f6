// The loop over the elements, once: [Note: one step] in update_rules.h over vectors of kLanes elements. What
// is the optimizer's own is a `Rule` of update_rules.inl.
//
// Before it is included inside an anonymous namespace, the ISA's file includes float_formats.inl and defines
//   kLanes, and Floats and Words: vectors of kLanes float and uint32_t
//   Floats square_root(Floats)                               IEEE
//   Words  widen(const uint16_t*)                            kLanes 16-bit patterns, zero-extended
//   void   narrow(Words low, Words high, uint16_t*)          the other way, 2 * kLanes words below 2^16
//   Floats load_float16(const uint16_t*)
//   Floats round_to_float16(Floats)                          to nearest even, and back
//   void   store_float16(Floats low, Floats high, uint16_t*) to nearest even

// Elements between two rounds of prefetch: two cache lines of fp32, one of 16 bits. Larger bursts were
// slower.
constexpr size_t kStride = 32;
// How far ahead, in elements: 1-2 KiB of each array hides the latency of DRAM behind the square root
// and the division; the hardware's prefetcher alone costs up to 15 % in the narrow formats, nothing in fp32.
constexpr size_t kPrefetchAhead = 512;
constexpr size_t kCacheLineBytes = 64;
constexpr size_t kPairLanes = 2 * kLanes;  // 16-bit arrays are stored a full pair of vectors at a time
static_assert(kStride % kPairLanes == 0);

typedef Floats UnalignedFloats __attribute__((aligned(4), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const UnalignedFloats*>(from); }
inline void store(Floats value, float* to) { *reinterpret_cast<UnalignedFloats*>(to) = value; }
inline Words bits_of(Floats value) { return reinterpret_cast<Words>(value); }
inline Words canonical_bits(Floats value) { return canonical_bits(value, bits_of(value)); }
inline Floats floats_of(Words bits) { return reinterpret_cast<Floats>(bits); }

struct Float32Gradient {
  using Element = float;
  static Floats load(const Element* from) { return *reinterpret_cast<const UnalignedFloats*>(from); }
  static Floats round(Floats value) { return value; }
};
struct BFloat16Gradient {
  using Element = uint16_t;
  static Floats load(const Element* from) { return floats_of(widen(from) << 16); }
  static Floats round(Floats value) { return floats_of(round_to_bfloat16(canonical_bits(value))); }
};
struct Float16Gradient {
  using Element = uint16_t;
  static Floats load(const Element* from) { return load_float16(from); }
  static Floats round(Floats value) { return round_to_float16(value); }
};

// How the master and the working weight lie in memory. `Element` is of `master`.
struct Float32Master {
  using Element = float;
  static constexpr bool kHasWeight = false;
  static Floats load(const Element* master, const uint16_t*) {
    return *reinterpret_cast<const UnalignedFloats*>(master);
  }
  static void store_pair(Floats low, Floats high, Element* master, uint16_t*) {
    store(low, master);
    store(high, master + kLanes);
  }
};
struct BFloat16WeightMaster : Float32Master {
  static constexpr bool kHasWeight = true;
  static void store_pair(Floats low, Floats high, Element* master, uint16_t* weight) {
    Float32Master::store_pair(low, high, master, nullptr);
    narrow(to_bfloat16_half_up(canonical_bits(low)), to_bfloat16_half_up(canonical_bits(high)), weight);
  }
};
struct Float16WeightMaster : Float32Master {
  static constexpr bool kHasWeight = true;
  static void store_pair(Floats low, Floats high, Element* master, uint16_t* weight) {
    Float32Master::store_pair(low, high, master, nullptr);
    store_float16(low, high, weight);
  }
};
struct SplitMaster {
  using Element = uint16_t;  // the pattern of the signed remainder
  static constexpr bool kHasWeight = true;
  static Floats load(const Element* master, const uint16_t* weight) {
    const Words remainder = widen(master);
    // Adds the remainder with its sign: 2^16 less where its top bit is set.
    return floats_of((widen(weight) << 16) + remainder - ((remainder & 0x8000u) << 1));
  }
  static void store_pair(Floats low, Floats high, Element* master, uint16_t* weight) {
    const Words low_bits = canonical_bits(low), high_bits = canonical_bits(high);
    narrow(to_bfloat16_half_up(low_bits), to_bfloat16_half_up(high_bits), weight);
    narrow(low_bits & 0xffffu, high_bits & 0xffffu, master);
  }
};

template <typename Gradient, typename Master>
struct Arrays {
  const typename Gradient::Element* gradient;
  typename Master::Element* master;
  uint16_t* weight;   // unused unless Master::kHasWeight
  float* exp_avg;     // unused unless Rule::kHasExpAvg
  float* exp_avg_sq;  // unused unless Rule::kHasExpAvgSq
};

inline Floats broadcast(float value) { return Floats{} + value; }

template <typename Rule>
struct Step {
  Rule rule;
  Words gradient_sign;  // flips the sign when the objective is maximized
  const Factor* factors;
  size_t factor_count;
};

template <typename Gradient, typename Rule>
inline Floats scaled_gradient(Floats gradient, const Step<Rule>& step) {
  for (size_t i = 0; i < step.factor_count; ++i) {
    const Floats value = broadcast(step.factors[i].value);
    const FactorKind kind = step.factors[i].kind;
    gradient = kind == FactorKind::kDivide ? gradient / value : gradient * value;
    if (kind != FactorKind::kMultiplyWide) gradient = Gradient::round(gradient);
  }
  return gradient;
}

template <typename Gradient, typename Master, typename Rule>
inline Floats update_lanes(const Arrays<Gradient, Master>& arrays, size_t at, const Step<Rule>& step) {
  Floats gradient = scaled_gradient<Gradient>(Gradient::load(arrays.gradient + at), step);
  gradient = floats_of(bits_of(gradient) ^ step.gradient_sign);
  const Floats weight = Master::load(arrays.master + at, arrays.weight + (Master::kHasWeight ? at : 0));
  return step.rule.update(gradient, weight, arrays.exp_avg + (Rule::kHasExpAvg ? at : 0),
                          arrays.exp_avg_sq + (Rule::kHasExpAvgSq ? at : 0));
}

template <typename Gradient, typename Master, typename Rule>
inline void update_pair(const Arrays<Gradient, Master>& arrays, size_t at, const Step<Rule>& step) {
  const Floats low = update_lanes(arrays, at, step);
  const Floats high = update_lanes(arrays, at + kLanes, step);
  Master::store_pair(low, high, arrays.master + at, arrays.weight + (Master::kHasWeight ? at : 0));
}

// Addresses beyond the end are fine: a prefetch never faults.
template <typename Element>
inline void prefetch_stride(const Element* array, size_t at) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(array) + (at + kPrefetchAhead) * sizeof(Element);
  for (size_t byte = 0; byte < kStride * sizeof(Element); byte += kCacheLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + byte));
  }
}

// The last elements: through copies of full length, so that they meet the same instructions.
template <typename Gradient, typename Master, typename Rule>
void update_tail(const Arrays<Gradient, Master>& arrays, size_t at, size_t count, const Step<Rule>& step) {
  typename Gradient::Element gradient[kPairLanes] = {};
  typename Master::Element master[kPairLanes] = {};
  uint16_t weight[kPairLanes] = {};
  float exp_avg[kPairLanes] = {}, exp_avg_sq[kPairLanes] = {};
  for (size_t i = 0; i < count; ++i) {
    gradient[i] = arrays.gradient[at + i];
    master[i] = arrays.master[at + i];
    if (Master::kHasWeight) weight[i] = arrays.weight[at + i];
    if (Rule::kHasExpAvg) exp_avg[i] = arrays.exp_avg[at + i];
    if (Rule::kHasExpAvgSq) exp_avg_sq[i] = arrays.exp_avg_sq[at + i];
  }
  update_pair(Arrays<Gradient, Master>{gradient, master, weight, exp_avg, exp_avg_sq}, 0, step);
  for (size_t i = 0; i < count; ++i) {
    arrays.master[at + i] = master[i];
    if (Master::kHasWeight) arrays.weight[at + i] = weight[i];
    if (Rule::kHasExpAvg) arrays.exp_avg[at + i] = exp_avg[i];
    if (Rule::kHasExpAvgSq) arrays.exp_avg_sq[at + i] = exp_avg_sq[i];
  }
}

template <typename Gradient, typename Master, typename Rule>
void update_span(const UpdateSpan& span, const Step<Rule>& step) {
  const Arrays<Gradient, Master> arrays = {static_cast<const typename Gradient::Element*>(span.gradient),
                                           static_cast<typename Master::Element*>(span.master),
                                           static_cast<uint16_t*>(span.weight), span.exp_avg,
                                           span.exp_avg_sq};
  size_t at = 0;
  for (; at + kStride <= span.count; at += kStride) {
    prefetch_stride(arrays.gradient, at);
    prefetch_stride(arrays.master, at);
    if (Master::kHasWeight) prefetch_stride(arrays.weight, at);
    if (Rule::kHasExpAvg) prefetch_stride(arrays.exp_avg, at);
    if (Rule::kHasExpAvgSq) prefetch_stride(arrays.exp_avg_sq, at);
    for (size_t pair = 0; pair < kStride; pair += kPairLanes) update_pair(arrays, at + pair, step);
  }
  for (; at + kPairLanes <= span.count; at += kPairLanes) update_pair(arrays, at, step);
  if (at < span.count) update_tail(arrays, at, span.count - at, step);
}

template <typename Gradient, typename Rule>
void update_by_master(const UpdateSpan& span, const Step<Rule>& step) {
  if (span.master_format == MasterFormat::kSplit) {
    update_span<Gradient, SplitMaster>(span, step);
  } else if (span.weight == nullptr) {
    update_span<Gradient, Float32Master>(span, step);
  } else if (span.weight_format == FloatFormat::kBFloat16) {
    update_span<Gradient, BFloat16WeightMaster>(span, step);
  } else {
    update_span<Gradient, Float16WeightMaster>(span, step);
  }
}

template <typename Rule>
void update(const UpdateSpan& span, const typename Rule::Scalars& scalars, const Factor* factors,
            size_t factor_count) {
  const Step<Rule> step = {Rule(scalars), Words{} + (scalars.maximize ? 0x80000000u : 0u), factors,
                           factor_count};
  switch (span.gradient_format) {
    case FloatFormat::kFloat32: return update_by_master<Float32Gradient>(span, step);
    case FloatFormat::kBFloat16: return update_by_master<BFloat16Gradient>(span, step);
    case FloatFormat::kFloat16: return update_by_master<Float16Gradient>(span, step);
  }
}
