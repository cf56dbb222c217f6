// The loop over the elements, once: [Note: one step] in update_rules.h over vectors of kLanes elements. What
// is the optimizer's own is a `Rule` of update_rules.inl.
//
// Include after lanes.inl and moment_formats.inl.

// A format is narrow when its array is of 16 bits or less and has both orders of a pair; the others are
// loaded and stored InHalves only.

struct Float32Gradient {
  using Element = float;
  static constexpr bool kNarrow = false;
  static Pair<Floats> load_pair(const Element* from, InHalves) { return {load(from), load(from + kLanes)}; }
  static Floats round(Floats value) { return value; }
};
struct BFloat16Gradient {
  using Element = uint16_t;
  static constexpr bool kNarrow = true;
  template <typename Order>
  static Pair<Floats> load_pair(const Element* from, Order order) {
    return floats_of(order.load_upper(from));
  }
  static Floats round(Floats value) { return floats_of(round_to_bfloat16(canonical_bits(value))); }
};
struct Float16Gradient {
  using Element = uint16_t;
  static constexpr bool kNarrow = false;
  static Pair<Floats> load_pair(const Element* from, InHalves) {
    return {load_float16(from), load_float16(from + kLanes)};
  }
  static Floats round(Floats value) { return round_to_float16(value); }
};

// How the master and the working weight lie in memory. `Element` is of `master`; one that kIsRounded is
// rounded stochastically to bf16 before it is stored.
struct Float32Master {
  using Element = float;
  static constexpr bool kHasWeight = false, kIsRounded = false, kNarrow = false;
  static Pair<Floats> load_pair(const Element* master, const uint16_t*, InHalves) {
    return {load(master), load(master + kLanes)};
  }
  static void store_pair(Pair<Floats> updated, Element* master, uint16_t*, InHalves) {
    store(updated.left, master);
    store(updated.right, master + kLanes);
  }
};
struct BFloat16WeightMaster : Float32Master {
  static constexpr bool kHasWeight = true;
  static void store_pair(Pair<Floats> updated, Element* master, uint16_t* weight, InHalves order) {
    Float32Master::store_pair(updated, master, nullptr, order);
    const Pair<Words> bits = canonical_bits(updated);
    order.store_upper({rounded_half_up(bits.left), rounded_half_up(bits.right)}, weight);
  }
};
struct Float16WeightMaster : Float32Master {
  static constexpr bool kHasWeight = true;
  static void store_pair(Pair<Floats> updated, Element* master, uint16_t* weight, InHalves order) {
    Float32Master::store_pair(updated, master, nullptr, order);
    store_float16(updated.left, updated.right, weight);
  }
};
struct SplitMaster {
  using Element = uint16_t;  // the pattern of the signed remainder
  static constexpr bool kHasWeight = true, kIsRounded = false, kNarrow = true;
  template <typename Order>
  static Pair<Floats> load_pair(const Element* master, const uint16_t* weight, Order order) {
    const Pair<Words> upper = order.load_upper(weight), remainder = order.load_signed(master);
    return {floats_of(upper.left + remainder.left), floats_of(upper.right + remainder.right)};
  }
  template <typename Order>
  static void store_pair(Pair<Floats> updated, Element* master, uint16_t* weight, Order order) {
    const Pair<Words> bits = canonical_bits(updated);
    order.store_upper({rounded_half_up(bits.left), rounded_half_up(bits.right)}, weight);
    order.store_lower(bits, master);
  }
};
struct BFloat16Master {
  using Element = uint16_t;  // the pattern of the weight
  static constexpr bool kHasWeight = false, kIsRounded = true, kNarrow = true;
  template <typename Order>
  static Pair<Floats> load_pair(const Element* master, const uint16_t*, Order order) {
    return floats_of(order.load_upper(master));
  }
  template <typename Order>
  static void store_pair(Pair<Floats> updated, Element* master, uint16_t*, Order order) {
    order.store_upper(bits_of(updated), master);
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

template <typename Gradient, typename Rule>
ALWAYS_INLINE Floats updated(Floats gradient, Floats weight, const Step<Rule>& step, Moments& moments) {
  gradient = scaled_gradient<Gradient>(gradient, step);
  return step.rule.update(floats_of(bits_of(gradient) ^ step.gradient_sign), weight, moments);
}

template <typename Gradient, typename Master, typename Rule, typename Kept, typename Order>
ALWAYS_INLINE void update_pair(const Arrays<Gradient, Master>& arrays, size_t at, const Step<Rule>& step,
                               Kept& kept, Order order) {
  uint16_t* const weight = arrays.weight + (Master::kHasWeight ? at : 0);
  Pair<Moments> moments = kept.load_pair(at, order);
  const Pair<Floats> gradients = Gradient::load_pair(arrays.gradient + at, order);
  Pair<Floats> masters = Master::load_pair(arrays.master + at, weight, order);
  masters = {updated<Gradient>(gradients.left, masters.left, step, moments.left),
             updated<Gradient>(gradients.right, masters.right, step, moments.right)};
  if (Master::kIsRounded) {
    const Pair<Words> bits = canonical_bits(masters), random = arrays.random.of_pair(at, order);
    masters = {floats_of(rounded_stochastically(bits.left, random.left & 0xffffu)),
               floats_of(rounded_stochastically(bits.right, random.right & 0xffffu))};
  }
  Master::store_pair(masters, arrays.master + at, weight, order);
  kept.store_pair(at, moments, order);
}

// The first elements of a span, as far as they fill groups; returns their number.
template <typename Gradient, typename Master, typename Kept, typename Rule>
ALWAYS_INLINE size_t update_groups(const UpdateSpan& span, const Step<Rule>& step) {
  using Order = typename OrderOf<Gradient::kNarrow && Master::kNarrow && Kept::kNarrow>::Type;
  const Arrays<Gradient, Master> arrays(span, step.key);
  typename Kept::Block block;
  Kept kept(span, step.key, block);
  size_t begin = 0;
  for (; begin + Kept::kGroup <= span.count; begin += Kept::kGroup) {
    for (size_t at = begin; at < begin + Kept::kGroup; at += kStride) {
      prefetch_stride(arrays.gradient, at);
      prefetch_stride(arrays.master, at);
      if (Master::kHasWeight) prefetch_stride(arrays.weight, at);
      if (Rule::kHasExpAvg) prefetch_stride(kept.first, at);
      if (Rule::kHasExpAvgSq) prefetch_stride(kept.second, at);
      for (size_t pair = 0; pair < kStride; pair += kPairLanes)
        update_pair(arrays, at + pair, step, kept, Order());
    }
    kept.end_group(begin, Order());
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
