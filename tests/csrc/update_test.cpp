#include "optimizer/update.h"

#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#if defined(__aarch64__)
#include <sys/prctl.h>
#endif

#include "base/worker_pool.h"
#include "check.h"
#include "optimizer/streaming_ceiling.h"
#include "updated_states.h"

namespace offload {
namespace {

using namespace test;

void every_isa_and_alignment_gives_the_same_bits_on_every_tail() {
  for (const UpdateScalars& scalars : kAllScalars) {
    for (const Layout& layout : all_layouts()) {
      // Every tail of a group of 32, or those around the ends of one block and of the next.
      const bool blocks = layout.moments == MomentFormat::kInt8;
      for (size_t count = 0; count < (blocks ? 520u : 100u); count += blocks && count % 256 == 34 ? 186 : 1) {
        States expected(layout, count, 0);
        const States start(layout, count, 0);
        update_states(expected.span_for(scalars), scalars, kFactors, 4, false, Isa::kScalar);
        CHECK(count < 8 || !(expected == start));  // a few in small formats may all be rounded back
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
  bad.master_format = MasterFormat::kBFloat16;
  bad.weight = memory;
  CHECK_THROWS(ErrorKind::kInvalidArgument, "weight must be null", update(bad));
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

// `make test-aarch64` names those of the CPU that qemu plays, the best last.
void the_instruction_sets_are_those_of_this_cpu() {
  std::string available;
  Isa best = Isa::kScalar;
  for (Isa isa : kAllIsas) {
    if (!isa_available(isa)) continue;
    available += std::string(available.empty() ? "" : " ") + isa_name(isa);
    best = isa;
  }
  CHECK(std::getenv("OFFLOAD_FORCE_ISA") != nullptr || active_isa() == best);
  const char* expected = std::getenv("EXPECTED_ISAS");
  CHECK(expected == nullptr || available == expected);
}

#if defined(__aarch64__)
void a_thread_with_shorter_sve_vectors_is_refused() {
  for (Isa isa : {Isa::kSve256, Isa::kSve512}) {
    if (!isa_available(isa)) continue;
    std::thread([isa] {
      CHECK_EQ(prctl(PR_SVE_SET_VL, 16), 16);
      CHECK(!isa_available(isa));
      CHECK(isa_available(Isa::kSve128));
      const States states({FloatFormat::kFloat32, MasterFormat::kFloat32, false, FloatFormat::kFloat32}, 40,
                          0);
      CHECK_THROWS(ErrorKind::kInvalidArgument, "instruction set",
                   update_states(states.span(), kScalars, nullptr, 0, false, isa));
    }).join();
    CHECK(isa_available(isa));
  }
}
#endif

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  the_instruction_sets_are_those_of_this_cpu();
#if defined(__aarch64__)
  a_thread_with_shorter_sve_vectors_is_refused();
#endif
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
