// States for an update, in every layout of memory that there is, with reproducible values.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <variant>
#include <vector>

#include "optimizer/update.h"

namespace offload::test {

inline constexpr MomentFormat kAllMoments[] = {MomentFormat::kFloat32, MomentFormat::kBFloat16,
                                               MomentFormat::kInt8};
inline constexpr FloatFormat kAllFormats[] = {FloatFormat::kFloat32, FloatFormat::kBFloat16,
                                              FloatFormat::kFloat16};
inline constexpr AdamWScalars kScalars = {.weight_scale = 0.9999f,
                                          .l2 = 0,
                                          .one_minus_beta1 = 0.1f,
                                          .beta2 = 0.999f,
                                          .one_minus_beta2 = 0.001f,
                                          .step_size = 1e-3f,
                                          .eps = 1e-8f,
                                          .maximize = false};
inline constexpr LionScalars kLion = {.weight_scale = 0.9999f,
                                      .beta1 = 0.9f,
                                      .one_minus_beta1 = 0.1f,
                                      .beta2 = 0.99f,
                                      .one_minus_beta2 = 0.01f,
                                      .step_size = 1e-3f,
                                      .maximize = false};
inline constexpr AdagradScalars kAdagrad = {.l2 = 0.01f, .step_size = 1e-2f, .eps = 1e-10f, .maximize = true};
inline const UpdateScalars kAllScalars[] = {kScalars, kLion, kAdagrad};
inline constexpr Factor kFactors[] = {{FactorKind::kMultiply, 0.3f},
                                      {FactorKind::kDivide, 7.0f},
                                      {FactorKind::kMultiplyReciprocal, 0.7f},
                                      {FactorKind::kMultiplyWide, 0.3f}};

inline size_t bytes_of(FloatFormat format) { return format == FloatFormat::kFloat32 ? 4 : 2; }

struct Layout {
  FloatFormat gradient;
  MasterFormat master;
  bool has_weight;
  FloatFormat weight;
  MomentFormat moments = MomentFormat::kFloat32;
};

inline size_t bytes_of(MomentFormat format) {
  return format == MomentFormat::kFloat32 ? 4 : format == MomentFormat::kBFloat16 ? 2 : 1;
}

inline std::vector<Layout> all_layouts() {
  std::vector<Layout> layouts;
  for (MomentFormat moments : kAllMoments) {
    for (FloatFormat gradient : kAllFormats) {
      layouts.push_back({gradient, MasterFormat::kFloat32, false, FloatFormat::kFloat32, moments});
      layouts.push_back({gradient, MasterFormat::kFloat32, true, FloatFormat::kBFloat16, moments});
      layouts.push_back({gradient, MasterFormat::kFloat32, true, FloatFormat::kFloat16, moments});
      layouts.push_back({gradient, MasterFormat::kSplit, true, FloatFormat::kBFloat16, moments});
      layouts.push_back({gradient, MasterFormat::kBFloat16, false, FloatFormat::kBFloat16, moments});
    }
  }
  return layouts;
}

// Exactly as many bytes as the elements need, so that AddressSanitizer sees any access beyond them, and
// `offset` elements into the allocation, so that vectors are not aligned.
class Array {
 public:
  Array(size_t count, size_t element_bytes, size_t offset)
      : bytes_((count + offset) * element_bytes),
        skip_(offset * element_bytes),
        memory_(new char[bytes_]()) {}

  template <typename Element>
  Element* as() const {
    return reinterpret_cast<Element*>(memory_.get() + skip_);
  }
  size_t bytes() const { return bytes_ - skip_; }
  bool operator==(const Array& other) const {
    return bytes() == other.bytes() && std::memcmp(as<char>(), other.as<char>(), bytes()) == 0;
  }

 private:
  size_t bytes_, skip_;
  std::unique_ptr<char[]> memory_;
};

// Reproducible fp32 values of both signs, with one of `exponent_count` exponents from `least_exponent` on, as
// the bits have them (0: denormals); else between 2^-8 and 2^8.
class Values {
 public:
  Values() = default;
  Values(uint32_t least_exponent, uint32_t exponent_count)
      : least_exponent_(least_exponent), exponent_count_(exponent_count) {}

  float next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    const auto random = static_cast<uint32_t>(state_ >> 32);
    const uint32_t bits =
        (random & 0x807fffffu) | ((least_exponent_ + (random >> 23) % exponent_count_) << 23);
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

 private:
  uint32_t least_exponent_ = 119, exponent_count_ = 16;
  uint64_t state_ = 1;
};

struct States {
  States(const Layout& layout, size_t count, size_t offset, Values values = {})
      : layout_(layout),
        count_(count),
        gradient(count, bytes_of(layout.gradient), offset),
        master(count, layout.master == MasterFormat::kFloat32 ? 4 : 2, offset),
        weight(count, 2, offset),
        exp_avg(count, bytes_of(layout.moments), offset),
        exp_avg_sq(count, bytes_of(layout.moments), offset),
        exp_avg_scales(block_count(), 4, offset),
        exp_avg_sq_scales(block_count(), 4, offset) {
    for (size_t i = 0; i < count; ++i) {
      const float g = values.next(), p = values.next();
      if (layout.gradient == FloatFormat::kFloat32) {
        gradient.as<float>()[i] = g;
      } else {  // any finite pattern will do: 0x0080 to 0x3fff of either sign
        uint32_t bits;
        std::memcpy(&bits, &g, sizeof(bits));
        gradient.as<uint16_t>()[i] = static_cast<uint16_t>((bits >> 16 & 0x8000u) | (bits & 0x3f7fu) | 0x80u);
      }
      if (layout.master == MasterFormat::kSplit) {
        split_master(&p, weight.as<uint16_t>() + i, master.as<int16_t>() + i, 1);
      } else if (layout.master == MasterFormat::kBFloat16) {
        int16_t remainder;
        split_master(&p, master.as<uint16_t>() + i, &remainder, 1);
      } else {
        master.as<float>()[i] = p;
      }
      const float first = values.next(), root = values.next();
      set_moments(i, first, root * root);
    }
    for (size_t block = 0; block < block_count(); ++block) {
      exp_avg_scales.as<float>()[block] = values.next();
      exp_avg_sq_scales.as<float>()[block] = values.next() * values.next();
    }
  }

  UpdateSpan span() const {
    return {.gradient = gradient.as<void>(),
            .master = master.as<void>(),
            .weight = layout_.has_weight ? weight.as<void>() : nullptr,
            .exp_avg = exp_avg.as<void>(),
            .exp_avg_sq = exp_avg_sq.as<void>(),
            .count = count_,
            .gradient_format = layout_.gradient,
            .weight_format = layout_.weight,
            .master_format = layout_.master,
            .moment_format = layout_.moments,
            .exp_avg_scales = exp_avg_scales.as<float>(),
            .exp_avg_sq_scales = exp_avg_sq_scales.as<float>(),
            .rounding_seed = 7};
  }

  // Without the states that the optimizer of `scalars` does not keep.
  UpdateSpan span_for(const UpdateScalars& scalars) const {
    UpdateSpan own = span();
    if (std::holds_alternative<AdagradScalars>(scalars)) own.exp_avg = own.exp_avg_scales = nullptr;
    if (std::holds_alternative<LionScalars>(scalars)) own.exp_avg_sq = own.exp_avg_sq_scales = nullptr;
    return own;
  }

  std::vector<const Array*> arrays() const {
    return {&gradient, &master, &weight, &exp_avg, &exp_avg_sq, &exp_avg_scales, &exp_avg_sq_scales};
  }

  bool operator==(const States& other) const {
    const auto own = arrays(), others = other.arrays();
    return std::equal(own.begin(), own.end(), others.begin(),
                      [](const Array* one, const Array* another) { return *one == *another; });
  }

  size_t block_count() const { return (count_ + kMomentBlock - 1) / kMomentBlock; }

  void set_moments(size_t i, float first, float second) {
    if (layout_.moments == MomentFormat::kFloat32) {
      exp_avg.as<float>()[i] = first;
      exp_avg_sq.as<float>()[i] = second;
    } else if (layout_.moments == MomentFormat::kBFloat16) {
      int16_t remainder;
      split_master(&first, exp_avg.as<uint16_t>() + i, &remainder, 1);
      split_master(&second, exp_avg_sq.as<uint16_t>() + i, &remainder, 1);
    } else {  // any pattern will do
      exp_avg.as<uint8_t>()[i] = static_cast<uint8_t>(__builtin_bit_cast(uint32_t, first) >> 8);
      exp_avg_sq.as<uint8_t>()[i] = static_cast<uint8_t>(__builtin_bit_cast(uint32_t, second) >> 8);
    }
  }

  Layout layout_;
  size_t count_;
  Array gradient, master, weight, exp_avg, exp_avg_sq, exp_avg_scales, exp_avg_sq_scales;
};

}  // namespace offload::test
