// Updates ahead of the step: kept to the bit, undone to the byte, in every format of the states.

#include "pipeline/update_ahead.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "device/host_device.h"
#include "pipeline/step_pipeline.h"

namespace offload {
namespace {

constexpr AdamWScalars kScalars{.weight_scale = 0.99f,
                                .l2 = 0.0f,
                                .one_minus_beta1 = 0.1f,
                                .beta2 = 0.999f,
                                .one_minus_beta2 = 0.001f,
                                .step_size = 0.01f,
                                .eps = 1e-8f,
                                .maximize = false,
                                .step = 3};

// The states of one parameter, as bytes, in any format.
struct States {
  static constexpr size_t kCount = 3000;  // three chunks, the last one short
  MasterFormat master_format;
  MomentFormat moment_format;
  std::vector<float> gradient = std::vector<float>(kCount);
  std::vector<float> master = std::vector<float>(kCount), scales = std::vector<float>(24, 0.001f);
  std::vector<uint16_t> weight = std::vector<uint16_t>(kCount, 0x3f80),
                        on_device = std::vector<uint16_t>(kCount);
  std::vector<float> exp_avg = std::vector<float>(kCount), exp_avg_sq = std::vector<float>(kCount);

  States(MasterFormat of_master, MomentFormat of_moments)
      : master_format(of_master), moment_format(of_moments) {
    for (size_t i = 0; i < kCount; ++i) gradient[i] = std::sin(static_cast<float>(i));
    if (master_format == MasterFormat::kBFloat16) std::memset(master.data(), 0x3f, kCount * 2);
  }

  UpdateSpan span() {
    const bool is_int8 = moment_format == MomentFormat::kInt8;
    return {.gradient = gradient.data(),
            .master = master.data(),
            .weight = master_format == MasterFormat::kBFloat16 ? nullptr : weight.data(),
            .exp_avg = exp_avg.data(),
            .exp_avg_sq = exp_avg_sq.data(),
            .count = kCount,
            .gradient_format = FloatFormat::kFloat32,
            .weight_format = FloatFormat::kBFloat16,
            .master_format = master_format,
            .moment_format = moment_format,
            .exp_avg_scales = is_int8 ? scales.data() : nullptr,
            .exp_avg_sq_scales = is_int8 ? scales.data() + 12 : nullptr,
            .rounding_seed = 7};
  }

  ParameterSlot slot() {
    const void* source =
        master_format == MasterFormat::kBFloat16 ? static_cast<void*>(master.data()) : weight.data();
    return {.name = "w",
            .span = span(),
            .upload_source = source,
            .device_weight = on_device.data(),
            .weight_bytes = kCount * 2};
  }

  void update(const std::vector<Factor>& factors = {}, AdamWScalars scalars = kScalars) {
    update_states(span(), scalars, factors.data(), factors.size(), false, active_isa());
  }

  bool is(const States& other) const {
    const auto same = [](const std::vector<float>& one, const std::vector<float>& two) {
      return std::memcmp(one.data(), two.data(), one.size() * sizeof(float)) == 0;
    };
    return same(master, other.master) && same(scales, other.scales) && same(exp_avg, other.exp_avg) &&
           same(exp_avg_sq, other.exp_avg_sq) && weight == other.weight;
  }
};

struct Fixture {
  std::shared_ptr<HostDevice> device = std::make_shared<HostDevice>(HostDeviceOptions());
  std::shared_ptr<TransferQueue> transfers = std::make_shared<TransferQueue>(device);
  std::unique_ptr<StepPipeline> pipeline = std::make_unique<StepPipeline>(transfers, 1024);
  States states;
  int64_t slot;
  std::vector<char> backup;

  explicit Fixture(MasterFormat master = MasterFormat::kSplit, MomentFormat moments = MomentFormat::kFloat32)
      : states(master, moments),
        slot(pipeline->add_slot(states.slot())),
        backup(pipeline->backup_bytes(slot), char{0x55}) {}

  StepJob job(const Ticket& gradient = {}, AdamWScalars scalars = kScalars) {
    return {.slot = slot,
            .gradient = states.gradient.data(),
            .gradient_format = FloatFormat::kFloat32,
            .tickets = {gradient},
            .scalars = scalars,
            .factors = {},
            .flush_denormals = false};
  }

  Ticket speculate(const Ticket& gradient = {}) { return pipeline->speculate(job(gradient), backup.data()); }
  void begin() { CHECK(speculate().wait()); }

  void step(AdamWScalars scalars = kScalars, std::vector<PendingFactor> factors = {}) {
    StepJob next = job({}, scalars);
    next.factors = std::move(factors);
    pipeline->wait(pipeline->submit({next}, 0));
  }

  bool counted(uint64_t kept, uint64_t discarded) const {
    return pipeline->stats().kept_count == kept && pipeline->stats().discarded_count == discarded;
  }
};

template <typename Test>
void in_every_format(Test test) {
  for (const MasterFormat master : {MasterFormat::kFloat32, MasterFormat::kSplit, MasterFormat::kBFloat16}) {
    for (const MomentFormat moments :
         {MomentFormat::kFloat32, MomentFormat::kBFloat16, MomentFormat::kInt8}) {
      test(master, moments);
    }
  }
}

void a_step_keeps_what_was_begun() {
  in_every_format([](MasterFormat master, MomentFormat moments) {
    Fixture f(master, moments);
    States expected(master, moments);
    expected.update();
    f.begin();
    CHECK(f.states.is(expected));
    CHECK(f.states.on_device == std::vector<uint16_t>(States::kCount));  // nothing is uploaded ahead
    f.step();
    CHECK(f.states.is(expected) && f.counted(1, 0));
    CHECK(std::memcmp(f.states.on_device.data(), f.states.slot().upload_source, States::kCount * 2) == 0);
    expected.update();
    f.step();  // the next one is a step as any
    CHECK(f.states.is(expected) && f.counted(1, 0));
  });
}

void what_is_not_kept_is_undone() {
  in_every_format([](MasterFormat master, MomentFormat moments) {
    Fixture f(master, moments);
    States expected(master, moments);
    f.begin();
    f.pipeline->wait({f.pipeline->discard({f.slot})});
    CHECK(f.states.is(expected) && f.counted(0, 1));
    f.begin();
    const float half = 0.5f;
    f.step(kScalars, {{FactorKind::kMultiply, &half, 0.0f}});
    expected.update({{FactorKind::kMultiply, 0.5f}});
    CHECK(f.states.is(expected) && f.counted(0, 2));
    f.begin();
    AdamWScalars other = kScalars;
    other.step_size = 0.02f;
    f.step(other);
    expected.update({}, other);
    CHECK(f.states.is(expected) && f.counted(0, 3));
  });
}

void a_clip_that_did_not_clip_changes_nothing() {
  Fixture f;
  States expected(MasterFormat::kSplit, MomentFormat::kFloat32);
  const float one = 1.0f;
  f.begin();
  f.step(kScalars, {{FactorKind::kMultiply, &one, 0.0f}, {FactorKind::kMultiplyWide, nullptr, 1.0f}});
  expected.update();
  CHECK(f.states.is(expected) && f.counted(1, 0));
}

void another_gradient_is_another_update() {
  Fixture f;
  States expected(MasterFormat::kSplit, MomentFormat::kFloat32);
  f.begin();
  const std::vector<float> gradient(States::kCount, 0.25f);
  StepJob job = f.job();
  job.gradient = gradient.data();
  f.pipeline->wait(f.pipeline->submit({job}, 0));
  expected.gradient = gradient;
  expected.update();
  CHECK(f.states.is(expected) && f.counted(0, 1));
}

void another_weight_is_another_update() {
  Fixture f(MasterFormat::kSplit);
  States expected(MasterFormat::kSplit, MomentFormat::kFloat32);
  const std::vector<uint16_t> before = f.states.weight;
  std::vector<uint16_t> elsewhere = before;
  f.begin();
  StepJob job = f.job();
  job.weight = elsewhere.data();
  f.pipeline->wait(f.pipeline->submit({job}, 0));
  expected.update();
  CHECK(f.counted(0, 1));
  CHECK(elsewhere == expected.weight && f.states.weight == before);
  CHECK(f.states.master == expected.master);
}

void a_failed_gradient_touches_no_states() {
  Fixture f;
  const States before(MasterFormat::kSplit, MomentFormat::kFloat32);
  const Ticket gradient = Ticket::pending();
  const Ticket ahead = f.speculate(gradient);
  gradient.fail(std::make_exception_ptr(Error(ErrorKind::kDevice, "the link is down")));
  CHECK(ahead.wait());  // the job tells of it, this one does not
  CHECK(f.states.is(before) && f.counted(0, 0));
  f.step();  // and with a gradient that arrived the step is as any
}

void a_job_that_fails_leaves_the_states_of_the_last_step() {
  Fixture f;
  const States before(MasterFormat::kSplit, MomentFormat::kFloat32);
  f.begin();
  const Ticket factor = Ticket::pending();
  factor.fail(std::make_exception_ptr(Error(ErrorKind::kDevice, "the link is down")));
  const Ticket job = f.pipeline->submit({f.job(factor)}, 0)[0];
  CHECK_THROWS(ErrorKind::kDevice, "'w': its gradient did not arrive", f.pipeline->wait({job}));
  CHECK(f.states.is(before) && f.counted(0, 1));
}

void what_follows_a_discarded_one_may_come_back_to_the_pipeline() {
  Fixture f;
  f.pipeline->hold();
  size_t seen = 0;
  const Ticket ahead = f.speculate();
  ahead.on_end([&](const std::exception_ptr&) { seen = f.pipeline->backup_bytes(f.slot); });
  const Ticket discarded = f.pipeline->discard({f.slot});
  CHECK(ahead.done());
  CHECK_EQ(seen, f.backup.size());
  f.pipeline->release();
  CHECK(discarded.wait());
}

void a_failed_upload_fails_the_job_that_kept_the_update() {
  Fixture f;
  f.begin();
  f.device->fail_copy(Direction::kToDevice, 1);
  const Ticket job = f.pipeline->submit({f.job()}, 0)[0];
  CHECK_THROWS(ErrorKind::kDevice, "'w': its upload failed", f.pipeline->wait({job}));
}

void it_waits_for_the_slots_last_upload() {
  Fixture f;
  f.device->hold(Direction::kToDevice);
  const Ticket step = f.pipeline->submit({f.job()}, 0)[0];
  const Ticket ahead = f.speculate();
  CHECK(!step.done() && !ahead.done());  // the upload still reads the weight
  f.device->release(Direction::kToDevice);
  CHECK(ahead.wait());
  States expected(MasterFormat::kSplit, MomentFormat::kFloat32);
  expected.update();
  CHECK(f.states.on_device == expected.weight);
  expected.update();
  CHECK(f.states.is(expected));
}

// A step of two slots, whose first job waits for a factor; the second's update is ahead.
struct TwoSlots : Fixture {
  States first{MasterFormat::kSplit, MomentFormat::kFloat32};
  int64_t first_slot = pipeline->add_slot(first.slot());
  Ticket gradient = Ticket::pending();
  Ticket clipped = Ticket::pending();
  float coefficient = 0;

  std::vector<Ticket> submit() {
    StepJob own = job(gradient);
    own.tickets.push_back(clipped);
    own.factors = {{FactorKind::kMultiply, &coefficient, 0.0f}};
    StepJob before = own;
    before.slot = first_slot;
    before.gradient = first.gradient.data();
    before.tickets = {clipped};
    return pipeline->submit({before, own}, 0);
  }
};

void it_begins_while_the_step_that_was_submitted_waits() {
  for (const float coefficient : {1.0f, 0.5f}) {
    TwoSlots f;
    const Ticket ahead = f.speculate(f.gradient);
    const std::vector<Ticket> step = f.submit();
    CHECK(!ahead.done());
    f.gradient.complete();
    CHECK(ahead.wait());
    States expected(MasterFormat::kSplit, MomentFormat::kFloat32);
    expected.update();
    CHECK(f.states.is(expected) && !step[0].done() && !step[1].done());
    f.coefficient = coefficient;
    f.clipped.complete();
    f.pipeline->wait(step);
    States clipped(MasterFormat::kSplit, MomentFormat::kFloat32);
    clipped.update({{FactorKind::kMultiply, coefficient}});
    CHECK(f.states.is(clipped) && f.first.is(clipped));
    CHECK(coefficient == 1.0f ? f.counted(1, 0) : f.counted(0, 1));
  }
}

void it_does_not_begin_when_the_step_can() {
  TwoSlots f;
  f.pipeline->hold();
  f.gradient.complete();
  const Ticket ahead = f.speculate(f.gradient);
  f.coefficient = 1;
  f.clipped.complete();
  const std::vector<Ticket> step = f.submit();
  CHECK(!ahead.done());
  f.pipeline->release();
  f.pipeline->wait(step);
  States expected(MasterFormat::kSplit, MomentFormat::kFloat32);
  expected.update();
  CHECK(ahead.done() && f.states.is(expected) && f.counted(0, 0));
}

void it_does_not_begin_where_its_own_job_is_next() {
  Fixture f;
  const Ticket gradient = Ticket::pending(), clipped = Ticket::pending();
  const Ticket ahead = f.speculate(gradient);
  StepJob job = f.job(gradient);
  job.tickets.push_back(clipped);
  const Ticket step = f.pipeline->submit({job}, 0)[0];
  gradient.complete();
  CHECK(ahead.wait());
  CHECK(f.states.is(States(MasterFormat::kSplit, MomentFormat::kFloat32)));
  clipped.complete();
  f.pipeline->wait({step});
  States expected(MasterFormat::kSplit, MomentFormat::kFloat32);
  expected.update();
  CHECK(f.states.is(expected) && f.counted(0, 0));
}

void a_step_that_fails_undoes_what_began_after_its_submission() {
  TwoSlots f;
  const Ticket ahead = f.speculate(f.gradient);
  const std::vector<Ticket> step = f.submit();
  f.gradient.complete();
  CHECK(ahead.wait());
  f.clipped.fail(std::make_exception_ptr(Error(ErrorKind::kDevice, "the link is down")));
  CHECK_THROWS(ErrorKind::kDevice, "'w': its gradient did not arrive", f.pipeline->wait(step));
  CHECK(step[1].wait_ended(-1));
  CHECK(f.states.is(States(MasterFormat::kSplit, MomentFormat::kFloat32)) && f.counted(0, 1));
}

void illegal_ones_are_refused() {
  Fixture f;
  CHECK_THROWS(ErrorKind::kInvalidArgument, "needs a backup", f.pipeline->speculate(f.job(), nullptr));
  StepJob job = f.job();
  job.factors = {{FactorKind::kMultiply, nullptr, 1.0f}};
  CHECK_THROWS(ErrorKind::kInvalidArgument, "without factors", f.pipeline->speculate(job, f.backup.data()));
  f.begin();
  CHECK_THROWS(ErrorKind::kInvalidArgument, "slot 5 does not exist", f.pipeline->discard({f.slot, 5}));
  f.step();
  CHECK(f.counted(1, 0));  // the slot that is there has kept its update
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  a_step_keeps_what_was_begun();
  what_is_not_kept_is_undone();
  a_clip_that_did_not_clip_changes_nothing();
  another_gradient_is_another_update();
  another_weight_is_another_update();
  a_failed_gradient_touches_no_states();
  a_job_that_fails_leaves_the_states_of_the_last_step();
  what_follows_a_discarded_one_may_come_back_to_the_pipeline();
  a_failed_upload_fails_the_job_that_kept_the_update();
  it_waits_for_the_slots_last_upload();
  it_begins_while_the_step_that_was_submitted_waits();
  it_does_not_begin_when_the_step_can();
  it_does_not_begin_where_its_own_job_is_next();
  a_step_that_fails_undoes_what_began_after_its_submission();
  illegal_ones_are_refused();
  return test::result();
}
