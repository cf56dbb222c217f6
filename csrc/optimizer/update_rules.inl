// The lines of each optimizer, over vectors of kLanes elements: the sequences of update_rules.h.
//
// Include after update_body.inl. update(gradient, weight, moments) changes the moments that its kHas
// constants name, with the square root of a second one, and returns the new master.

struct AdamW {
  using Scalars = AdamWScalars;
  static constexpr bool kHasExpAvg = true, kHasExpAvgSq = true;

  explicit AdamW(const Scalars& scalars)
      : weight_scale(broadcast(scalars.weight_scale)),
        l2(broadcast(scalars.l2)),
        one_minus_beta1(broadcast(scalars.one_minus_beta1)),
        beta2(broadcast(scalars.beta2)),
        one_minus_beta2(broadcast(scalars.one_minus_beta2)),
        step_size(broadcast(scalars.step_size)),
        eps(broadcast(scalars.eps)),
        has_l2(scalars.l2 != 0) {}

  ALWAYS_INLINE Floats update(Floats gradient, Floats weight, Moments& moments) const {
    if (has_l2) {
      gradient = gradient + l2 * weight;
    } else {
      weight = weight * weight_scale;
    }
    moments.first = moments.first + (gradient - moments.first) * one_minus_beta1;
    moments.second = moments.second * beta2 + (one_minus_beta2 * gradient) * gradient;
    moments.root = square_root(moments.second);
    return weight - (step_size * moments.first) / (moments.root + eps);
  }

  Floats weight_scale, l2, one_minus_beta1, beta2, one_minus_beta2, step_size, eps;
  bool has_l2;
};

struct Lion {
  using Scalars = LionScalars;
  static constexpr bool kHasExpAvg = true, kHasExpAvgSq = false;

  explicit Lion(const Scalars& scalars)
      : weight_scale(broadcast(scalars.weight_scale)),
        beta1(broadcast(scalars.beta1)),
        one_minus_beta1(broadcast(scalars.one_minus_beta1)),
        beta2(broadcast(scalars.beta2)),
        one_minus_beta2(broadcast(scalars.one_minus_beta2)),
        step_size(broadcast(scalars.step_size)) {}

  ALWAYS_INLINE Floats update(Floats gradient, Floats weight, Moments& moments) const {
    const Floats zero = {};
    const Floats direction = moments.first * beta1 + gradient * one_minus_beta1;
    moments.first = moments.first * beta2 + gradient * one_minus_beta2;
    const Floats step = direction > zero ? step_size : direction < zero ? -step_size : zero;
    return weight * weight_scale - step;
  }

  Floats weight_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size;
};

struct Adagrad {
  using Scalars = AdagradScalars;
  static constexpr bool kHasExpAvg = false, kHasExpAvgSq = true;

  explicit Adagrad(const Scalars& scalars)
      : l2(broadcast(scalars.l2)),
        step_size(broadcast(scalars.step_size)),
        eps(broadcast(scalars.eps)),
        has_l2(scalars.l2 != 0) {}

  ALWAYS_INLINE Floats update(Floats gradient, Floats weight, Moments& moments) const {
    if (has_l2) gradient = gradient + l2 * weight;
    moments.second = moments.second + gradient * gradient;
    moments.root = square_root(moments.second);
    return weight - (step_size * gradient) / (moments.root + eps);
  }

  Floats l2, step_size, eps;
  bool has_l2;
};
