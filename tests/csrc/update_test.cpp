#include "optimizer/update.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <variant>
#include <vector>

#include "base/worker_pool.h"
#include "check.h"
#include "optimizer/streaming_ceiling.h"

namespace offload {
namespace {

constexpr Isa kAllIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512};
constexpr MomentFormat kAllMoments[] = {MomentFormat::kFloat32, MomentFormat::kBFloat16, MomentFormat::kInt8};
constexpr FloatFormat kAllFormats[] = {FloatFormat::kFloat32, FloatFormat::kBFloat16, FloatFormat::kFloat16};
constexpr AdamWScalars kScalars = {.weight_scale = 0.9999f,
                                   .l2 = 0,
                                   .one_minus_beta1 = 0.1f,
                                   .beta2 = 0.999f,
                                   .one_minus_beta2 = 0.001f,
                                   .step_size = 1e-3f,
                                   .eps = 1e-8f,
                                   .maximize = false};
constexpr LionScalars kLion = {.weight_scale = 0.9999f,
                               .beta1 = 0.9f,
                               .one_minus_beta1 = 0.1f,
                               .beta2 = 0.99f,
                               .one_minus_beta2 = 0.01f,
                               .step_size = 1e-3f,
                               .maximize = false};
constexpr AdagradScalars kAdagrad = {.l2 = 0.01f, .step_size = 1e-2f, .eps = 1e-10f, .maximize = true};
const UpdateScalars kAllScalars[] = {kScalars, kLion, kAdagrad};
constexpr Factor kFactors[] = {{FactorKind::kMultiply, 0.3f},
                               {FactorKind::kDivide, 7.0f},
                               {FactorKind::kMultiplyReciprocal, 0.7f},
                               {FactorKind::kMultiplyWide, 0.3f}};

size_t bytes_of(FloatFormat format) { return format == FloatFormat::kFloat32 ? 4 : 2; }

struct Layout {
  FloatFormat gradient;
  MasterFormat master;
  bool has_weight;
  FloatFormat weight;
  MomentFormat moments = MomentFormat::kFloat32;
};

size_t bytes_of(MomentFormat format) {
  return format == MomentFormat::kFloat32 ? 4 : format == MomentFormat::kBFloat16 ? 2 : 1;
}

std::vector<Layout> all_layouts() {
  std::vector<Layout> layouts;
  for (MomentFormat moments : kAllMoments) {
    for (FloatFormat gradient : kAllFormats) {
      layouts.push_back({gradient, MasterFormat::kFloat32, false, FloatFormat::kFloat32, moments});
      layouts.push_back({gradient, MasterFormat::kFloat32, true, FloatFormat::kBFloat16, moments});
      layouts.push_back({gradient, MasterFormat::kFloat32, true, FloatFormat::kFloat16, moments});
      layouts.push_back({gradient, MasterFormat::kSplit, true, FloatFormat::kBFloat16, moments});
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
  bool operator==(const Array& other) const {
    return bytes_ - skip_ == other.bytes_ - other.skip_ &&
           std::memcmp(as<char>(), other.as<char>(), bytes_ - skip_) == 0;
  }

 private:
  size_t bytes_, skip_;
  std::unique_ptr<char[]> memory_;
};

// Reproducible fp32 values between 2^-8 and 2^8 of both signs.
class Values {
 public:
  float next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    const auto random = static_cast<uint32_t>(state_ >> 32);
    const uint32_t bits = (random & 0x807fffffu) | ((119 + (random >> 23) % 16) << 23);
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

 private:
  uint64_t state_ = 1;
};

struct States {
  States(const Layout& layout, size_t count, size_t offset)
      : layout_(layout),
        count_(count),
        gradient(count, bytes_of(layout.gradient), offset),
        master(count, layout.master == MasterFormat::kSplit ? 2 : 4, offset),
        weight(count, 2, offset),
        exp_avg(count, bytes_of(layout.moments), offset),
        exp_avg_sq(count, bytes_of(layout.moments), offset),
        exp_avg_scales(block_count(), 4, offset),
        exp_avg_sq_scales(block_count(), 4, offset) {
    Values values;
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

  bool operator==(const States& other) const {
    return gradient == other.gradient && master == other.master && weight == other.weight &&
           exp_avg == other.exp_avg && exp_avg_sq == other.exp_avg_sq &&
           exp_avg_scales == other.exp_avg_scales && exp_avg_sq_scales == other.exp_avg_sq_scales;
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

void every_isa_and_alignment_gives_the_same_bits_on_every_tail() {
  for (const UpdateScalars& scalars : kAllScalars) {
    for (const Layout& layout : all_layouts()) {
      // Every tail of a group of 32, or those around the ends of one block and of the next.
      const bool blocks = layout.moments == MomentFormat::kInt8;
      for (size_t count = 0; count < (blocks ? 520u : 100u); count += blocks && count % 256 == 34 ? 186 : 1) {
        States expected(layout, count, 0);
        const States start(layout, count, 0);
        update_states(expected.span_for(scalars), scalars, kFactors, 4, false, Isa::kScalar);
        CHECK(count == 0 || !(expected == start));
        for (Isa isa : kAllIsas) {
          if (!isa_available(isa)) continue;
          States seen(layout, count, count % 5);
          update_states(seen.span_for(scalars), scalars, kFactors, 4, false, isa);
          CHECK(seen == expected);
        }
      }
    }
  }
}

void threads_do_not_change_the_bits() {
  WorkerPool pool(4);
  for (const UpdateScalars& scalars : kAllScalars) {
    for (const Layout& layout : all_layouts()) {
      constexpr size_t kCount = 100'003;  // several blocks and a tail
      States expected(layout, kCount, 0), seen(layout, kCount, 1);
      update_states(expected.span_for(scalars), scalars, kFactors, 4, false, active_isa());
      update_states_parallel(pool, seen.span_for(scalars), scalars, kFactors, 4, false, active_isa());
      CHECK(seen == expected);
    }
  }
}

void one_step_of_adamw_by_hand() {
  float gradient = 2, master = 1, exp_avg = 0, exp_avg_sq = 0;
  const UpdateSpan span = {&gradient,
                           &master,
                           nullptr,
                           &exp_avg,
                           &exp_avg_sq,
                           1,
                           FloatFormat::kFloat32,
                           FloatFormat::kFloat32,
                           MasterFormat::kFloat32};
  const AdamWScalars scalars = {.weight_scale = 0.5f,
                                .l2 = 0,
                                .one_minus_beta1 = 0.25f,
                                .beta2 = 0.5f,
                                .one_minus_beta2 = 0.25f,
                                .step_size = 0.5f,
                                .eps = 1,
                                .maximize = false};
  update_states(span, scalars, nullptr, 0, false, active_isa());
  CHECK_EQ(exp_avg, 0.5f);
  CHECK_EQ(exp_avg_sq, 1.0f);
  CHECK_EQ(master, 0.375f);  // 1 * 0.5 - 0.5 * 0.5 / (1 + 1)
}

void one_step_of_lion_by_hand() {
  const LionScalars scalars = {.weight_scale = 0.5f,
                               .beta1 = 0.5f,
                               .one_minus_beta1 = 0.5f,
                               .beta2 = 0.25f,
                               .one_minus_beta2 = 0.75f,
                               .step_size = 0.125f,
                               .maximize = false};
  // Down, up, and neither where the two cancel, or where both are zeros of either sign; NaN shows in the
  // moment.
  float gradient[] = {2, -2, 4, -0.0f, __builtin_nanf("")};
  float master[] = {1, 1, 1, 1, 1}, exp_avg[] = {4, 1, -4, 0, 1};
  const UpdateSpan span = {.gradient = gradient,
                           .master = master,
                           .weight = nullptr,
                           .exp_avg = exp_avg,
                           .exp_avg_sq = nullptr,
                           .count = 5,
                           .gradient_format = FloatFormat::kFloat32,
                           .weight_format = FloatFormat::kFloat32,
                           .master_format = MasterFormat::kFloat32};
  update_states(span, scalars, nullptr, 0, false, active_isa());
  const float masters[] = {0.375f, 0.625f, 0.5f, 0.5f, 0.5f}, moments[] = {2.5f, -1.25f, 2, 0};
  for (int i = 0; i < 5; ++i) CHECK_EQ(master[i], masters[i]);
  for (int i = 0; i < 4; ++i) CHECK_EQ(exp_avg[i], moments[i]);
  CHECK(exp_avg[4] != exp_avg[4]);
}

void one_step_of_adagrad_by_hand() {
  float gradient = 2, master = 4, sum = 7;
  const UpdateSpan span = {.gradient = &gradient,
                           .master = &master,
                           .weight = nullptr,
                           .exp_avg = nullptr,
                           .exp_avg_sq = &sum,
                           .count = 1,
                           .gradient_format = FloatFormat::kFloat32,
                           .weight_format = FloatFormat::kFloat32,
                           .master_format = MasterFormat::kFloat32};
  const AdagradScalars scalars = {.l2 = 0.25f, .step_size = 0.5f, .eps = 2, .maximize = false};
  update_states(span, scalars, nullptr, 0, false, active_isa());  // the gradient is 2 + 0.25 * 4
  CHECK_EQ(sum, 16.0f);
  CHECK_EQ(master, 3.75f);  // 4 - 0.5 * 3 / (4 + 2)
}

void denormals_are_flushed_only_on_request_and_the_mode_comes_back() {
  const bool before = flush_denormals_enabled();
  for (bool flush : {false, true}) {
    for (Isa isa : kAllIsas) {
      if (!isa_available(isa)) continue;
      float gradient = 0, master = 1, exp_avg = 1e-40f, exp_avg_sq = 1;
      const UpdateSpan span = {&gradient,
                               &master,
                               nullptr,
                               &exp_avg,
                               &exp_avg_sq,
                               1,
                               FloatFormat::kFloat32,
                               FloatFormat::kFloat32,
                               MasterFormat::kFloat32};
      update_states(span, kScalars, nullptr, 0, flush, isa);
      uint32_t bits;
      std::memcpy(&bits, &exp_avg, sizeof(bits));
      CHECK_EQ(bits == 0, flush);
      CHECK_EQ(flush_denormals_enabled(), before);
    }
  }
}

void spans_that_are_not_legal_are_refused() {
  float memory[4] = {};
  const UpdateSpan good = {memory,
                           memory + 1,
                           nullptr,
                           memory + 2,
                           memory + 3,
                           1,
                           FloatFormat::kFloat32,
                           FloatFormat::kFloat32,
                           MasterFormat::kFloat32};
  auto update = [](const UpdateSpan& span) {
    update_states(span, kScalars, nullptr, 0, false, Isa::kScalar);
  };
  UpdateSpan bad = good;
  bad.gradient = nullptr;
  CHECK_THROWS(ErrorKind::kInvalidArgument, "gradient", update(bad));
  bad = good;
  bad.exp_avg = nullptr;
  CHECK_THROWS(ErrorKind::kInvalidArgument, "exp_avg is null", update(bad));
  CHECK_THROWS(ErrorKind::kInvalidArgument, "exp_avg is null",
               update_states(bad, kLion, nullptr, 0, false, Isa::kScalar));
  bad = good;
  bad.exp_avg_sq = nullptr;
  CHECK_THROWS(ErrorKind::kInvalidArgument, "exp_avg_sq is null", update(bad));
  CHECK_THROWS(ErrorKind::kInvalidArgument, "exp_avg_sq is null",
               update_states(bad, kAdagrad, nullptr, 0, false, Isa::kScalar));
  bad = good;
  bad.weight = memory;
  CHECK_THROWS(ErrorKind::kInvalidArgument, "weight", update(bad));
  bad = good;
  bad.master_format = MasterFormat::kSplit;
  CHECK_THROWS(ErrorKind::kInvalidArgument, "split", update(bad));
  bad = good;
  bad.gradient_format = static_cast<FloatFormat>(9);
  CHECK_THROWS(ErrorKind::kInvalidArgument, "gradient_format", update(bad));
  CHECK_THROWS(ErrorKind::kInvalidArgument, "factors",
               update_states(good, kScalars, nullptr, 1, false, Isa::kScalar));
  CHECK_THROWS(ErrorKind::kInvalidArgument, "instruction set",
               update_states(good, kScalars, nullptr, 0, false, static_cast<Isa>(9)));
}

void split_and_join_are_exact() {
  for (uint32_t high : {0x0000u, 0x3f80u, 0x3f81u, 0x7f7fu, 0x8000u, 0xff7fu}) {
    for (uint32_t low = 0; low <= 0xffffu; ++low) {
      const uint32_t bits = (high << 16) | low;
      float master, joined;
      std::memcpy(&master, &bits, sizeof(master));
      uint16_t weight;
      int16_t remainder;
      split_master(&master, &weight, &remainder, 1);
      join_master(&weight, &remainder, &joined, 1);
      CHECK(std::memcmp(&master, &joined, sizeof(master)) == 0);
      CHECK_EQ(weight, static_cast<uint16_t>(high + (low >> 15)));  // half up in magnitude
    }
  }
}

void a_streaming_pass_keeps_what_it_updates() {
  constexpr size_t kCount = 96 * 1024 + 64;
  WorkerPool pool(2);
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  for (bool non_temporal : {false, true}) {
    for (bool prefetch : {false, true}) {
      std::vector<Line> read(kCount / 16, Line{{1}}), update(kCount / 32, Line{{2}}),
          write(kCount / 32, Line{{3}}), bytes(kCount / 64, Line{{4}});
      streaming_pass(pool,
                     {{read.data(), 4, Access::kRead},
                      {update.data(), 2, Access::kUpdate},
                      {write.data(), 2, Access::kWrite},
                      {bytes.data(), 1, Access::kUpdate}},
                     kCount, {.non_temporal = non_temporal, .prefetch = prefetch});
      for (const Line& line : read) CHECK(line.bytes[0] == 1 && line.bytes[63] == 0);
      for (const Line& line : update) CHECK(line.bytes[0] == 2 && line.bytes[63] == 0);
      for (const Line& line : write) CHECK(line.bytes[0] == 0);
      for (const Line& line : bytes) CHECK(line.bytes[0] == 4 && line.bytes[63] == 0);
    }
  }
  Line line = {};
  CHECK_THROWS(ErrorKind::kInvalidArgument, "multiple",
               streaming_pass(pool, {{line.bytes, 2, Access::kRead}}, 31, {}));
  CHECK_THROWS(ErrorKind::kInvalidArgument, "multiples of 64",
               streaming_pass(pool, {{line.bytes + 2, 2, Access::kRead}}, 64, {}));
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  every_isa_and_alignment_gives_the_same_bits_on_every_tail();
  threads_do_not_change_the_bits();
  one_step_of_adamw_by_hand();
  one_step_of_lion_by_hand();
  one_step_of_adagrad_by_hand();
  denormals_are_flushed_only_on_request_and_the_mode_comes_back();
  spans_that_are_not_legal_are_refused();
  split_and_join_are_exact();
  a_streaming_pass_keeps_what_it_updates();
  return test::result();
}
