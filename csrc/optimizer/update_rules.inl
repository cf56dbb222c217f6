// The lines of each optimizer, over vectors of kLanes elements: the sequences of update_rules.h.
//
// Include after update_body.inl. update(gradient, weight, exp_avg, exp_avg_sq) writes the states at those
// addresses and returns the new master; it may use the addresses that its kHas constants name.

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

  Floats update(Floats gradient, Floats weight, float* first, float* second) const {
    if (has_l2) {
      gradient = gradient + l2 * weight;
    } else {
      weight = weight * weight_scale;
    }
    Floats exp_avg = load(first);
    exp_avg = exp_avg + (gradient - exp_avg) * one_minus_beta1;
    store(exp_avg, first);
    Floats exp_avg_sq = load(second);
    exp_avg_sq = exp_avg_sq * beta2 + (one_minus_beta2 * gradient) * gradient;
    store(exp_avg_sq, second);
    return weight - (step_size * exp_avg) / (square_root(exp_avg_sq) + eps);
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

  Floats update(Floats gradient, Floats weight, float* first, float*) const {
    const Floats zero = {};
    const Floats exp_avg = load(first);
    const Floats direction = exp_avg * beta1 + gradient * one_minus_beta1;
    store(exp_avg * beta2 + gradient * one_minus_beta2, first);
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

  Floats update(Floats gradient, Floats weight, float*, float* second) const {
    if (has_l2) gradient = gradient + l2 * weight;
    const Floats sum = load(second) + gradient * gradient;
    store(sum, second);
    return weight - (step_size * gradient) / (square_root(sum) + eps);
  }

  Floats l2, step_size, eps;
  bool has_l2;
};
