// The loop over the elements, once: [Note: one step] in update_rules.h over vectors of kLanes elements. What
// is the optimizer's own is a `Rule` of update_rules.inl.
//
// Include after lanes.inl and moment_formats.inl.

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

// How the master and the working weight lie in memory. `Element` is of `master`; one that kIsRounded is
// rounded stochastically to bf16 before it is stored.
struct Float32Master {
  using Element = float;
  static constexpr bool kHasWeight = false, kIsRounded = false;
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
  static constexpr bool kHasWeight = true, kIsRounded = false;
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
struct BFloat16Master {
  using Element = uint16_t;  // the pattern of the weight
  static constexpr bool kHasWeight = false, kIsRounded = true;
  static Floats load(const Element* master, const uint16_t*) { return floats_of(widen(master) << 16); }
  static void store_pair(Floats low, Floats high, Element* master, uint16_t*) {
    narrow(bits_of(low) >> 16, bits_of(high) >> 16, master);
  }
};

template <typename Gradient, typename Master>
struct Arrays {
  const typename Gradient::Element* gradient;
  typename Master::Element* master;
  uint16_t* weight;    // unused unless Master::kHasWeight
  RandomWords random;  // unused unless Master::kIsRounded

  Arrays(const UpdateSpan& span, uint32_t key)
      : gradient(static_cast<const typename Gradient::Element*>(span.gradient)),
        master(static_cast<typename Master::Element*>(span.master)),
        weight(static_cast<uint16_t*>(span.weight)),
        random(span, scrambled(key)) {}
};

template <typename Rule>
struct Step {
  Rule rule;
  Words gradient_sign;  // flips the sign when the objective is maximized
  const Factor* factors;
  size_t factor_count;
  uint32_t key;  // of the random words
};

template <typename Gradient, typename Rule>
ALWAYS_INLINE Floats scaled_gradient(Floats gradient, const Step<Rule>& step) {
  for (size_t i = 0; i < step.factor_count; ++i) {
    const Floats value = broadcast(step.factors[i].value);
    const FactorKind kind = step.factors[i].kind;
    gradient = kind == FactorKind::kDivide ? gradient / value : gradient * value;
    if (kind != FactorKind::kMultiplyWide) gradient = Gradient::round(gradient);
  }
  return gradient;
}

// Returns the new master, as it is to be stored.
template <typename Gradient, typename Master, typename Rule>
ALWAYS_INLINE Floats update_lanes(const Arrays<Gradient, Master>& arrays, size_t at, const Step<Rule>& step,
                                  Moments& moments) {
  Floats gradient = scaled_gradient<Gradient>(Gradient::load(arrays.gradient + at), step);
  gradient = floats_of(bits_of(gradient) ^ step.gradient_sign);
  const Floats weight = Master::load(arrays.master + at, arrays.weight + (Master::kHasWeight ? at : 0));
  const Floats updated = step.rule.update(gradient, weight, moments);
  if (!Master::kIsRounded) return updated;
  return floats_of(to_bfloat16_stochastic(canonical_bits(updated), arrays.random.from(at) & 0xffffu) << 16);
}

template <typename Gradient, typename Master, typename Rule, typename Kept>
ALWAYS_INLINE void update_pair(const Arrays<Gradient, Master>& arrays, size_t at, const Step<Rule>& step,
                               Kept& kept) {
  Moments low = kept.load(at), high = kept.load(at + kLanes);
  const Floats low_master = update_lanes(arrays, at, step, low);
  const Floats high_master = update_lanes(arrays, at + kLanes, step, high);
  Master::store_pair(low_master, high_master, arrays.master + at,
                     arrays.weight + (Master::kHasWeight ? at : 0));
  kept.store_pair(at, low, high);
}

// The first elements of a span, as far as they fill groups; returns their number.
template <typename Gradient, typename Master, typename Kept, typename Rule>
ALWAYS_INLINE size_t update_groups(const UpdateSpan& span, const Step<Rule>& step) {
  const Arrays<Gradient, Master> arrays(span, step.key);
  size_t begin = 0;
  for (; begin + Kept::kGroup <= span.count; begin += Kept::kGroup) {
    Kept kept(span, begin, step.key);
    for (size_t at = begin; at < begin + Kept::kGroup; at += kStride) {
      prefetch_stride(arrays.gradient, at);
      prefetch_stride(arrays.master, at);
      if (Master::kHasWeight) prefetch_stride(arrays.weight, at);
      if (Rule::kHasExpAvg) prefetch_stride(kept.first, at);
      if (Rule::kHasExpAvgSq) prefetch_stride(kept.second, at);
      for (size_t pair = 0; pair < kStride; pair += kPairLanes) update_pair(arrays, at + pair, step, kept);
    }
    kept.finish();
  }
  return begin;
}

template <typename Element>
inline void copy(const void* from, size_t from_index, void* to, size_t to_index, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    static_cast<Element*>(to)[to_index + i] = static_cast<const Element*>(from)[from_index + i];
  }
}

// The elements from `at` on, less than a group: through copies of full length, so that they meet the same
// instructions. Zeros beyond the end stay zeros and change no scale.
template <typename Gradient, typename Master, typename Kept, typename Rule>
void update_tail(const UpdateSpan& span, size_t at, const Step<Rule>& step) {
  typename Gradient::Element gradient[Kept::kGroup] = {};
  typename Master::Element master[Kept::kGroup] = {};
  uint16_t weight[Kept::kGroup] = {};
  typename Kept::Element exp_avg[Kept::kGroup] = {}, exp_avg_sq[Kept::kGroup] = {};
  const size_t count = span.count - at;
  copy<typename Gradient::Element>(span.gradient, at, gradient, 0, count);
  copy<typename Master::Element>(span.master, at, master, 0, count);
  if (Master::kHasWeight) copy<uint16_t>(span.weight, at, weight, 0, count);
  if (Rule::kHasExpAvg) copy<typename Kept::Element>(span.exp_avg, at, exp_avg, 0, count);
  if (Rule::kHasExpAvgSq) copy<typename Kept::Element>(span.exp_avg_sq, at, exp_avg_sq, 0, count);

  UpdateSpan whole = span;
  whole.gradient = gradient;
  whole.master = master;
  whole.weight = weight;
  whole.exp_avg = exp_avg;
  whole.exp_avg_sq = exp_avg_sq;
  if (span.exp_avg_scales != nullptr) whole.exp_avg_scales += at / kMomentBlock;
  if (span.exp_avg_sq_scales != nullptr) whole.exp_avg_sq_scales += at / kMomentBlock;
  whole.count = Kept::kGroup;
  whole.first_element += at;
  update_groups<Gradient, Master, Kept>(whole, step);

  copy<typename Master::Element>(master, 0, span.master, at, count);
  if (Master::kHasWeight) copy<uint16_t>(weight, 0, span.weight, at, count);
  if (Rule::kHasExpAvg) copy<typename Kept::Element>(exp_avg, 0, span.exp_avg, at, count);
  if (Rule::kHasExpAvgSq) copy<typename Kept::Element>(exp_avg_sq, 0, span.exp_avg_sq, at, count);
}

template <typename Gradient, typename Master, typename Kept, typename Rule>
void update_span(const UpdateSpan& span, const Step<Rule>& step) {
  const size_t done = update_groups<Gradient, Master, Kept>(span, step);
  if (done < span.count) update_tail<Gradient, Master, Kept>(span, done, step);
}

template <typename Gradient, typename Master, typename Rule>
void update_by_moments(const UpdateSpan& span, const Step<Rule>& step) {
  switch (span.moment_format) {
    case MomentFormat::kFloat32: return update_span<Gradient, Master, Float32Moments<Rule>>(span, step);
    case MomentFormat::kBFloat16: return update_span<Gradient, Master, BFloat16Moments<Rule>>(span, step);
    case MomentFormat::kInt8: return update_span<Gradient, Master, Int8Moments<Rule>>(span, step);
  }
}

template <typename Gradient, typename Rule>
void update_by_master(const UpdateSpan& span, const Step<Rule>& step) {
  if (span.master_format == MasterFormat::kSplit) {
    update_by_moments<Gradient, SplitMaster>(span, step);
  } else if (span.master_format == MasterFormat::kBFloat16) {
    update_by_moments<Gradient, BFloat16Master>(span, step);
  } else if (span.weight == nullptr) {
    update_by_moments<Gradient, Float32Master>(span, step);
  } else if (span.weight_format == FloatFormat::kBFloat16) {
    update_by_moments<Gradient, BFloat16WeightMaster>(span, step);
  } else {
    update_by_moments<Gradient, Float16WeightMaster>(span, step);
  }
}

template <typename Rule>
void update(const UpdateSpan& span, const typename Rule::Scalars& scalars, const Factor* factors,
            size_t factor_count) {
  const Step<Rule> step = {Rule(scalars), Words{} + (scalars.maximize ? 0x80000000u : 0u), factors,
                           factor_count, rounding_key(span.rounding_seed, scalars.step)};
  switch (span.gradient_format) {
    case FloatFormat::kFloat32: return update_by_master<Float32Gradient>(span, step);
    case FloatFormat::kBFloat16: return update_by_master<BFloat16Gradient>(span, step);
    case FloatFormat::kFloat16: return update_by_master<Float16Gradient>(span, step);
  }
}
