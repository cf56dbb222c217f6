#include "pipeline/step_pipeline.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "device/host_device.h"

namespace offload {
namespace {

constexpr int64_t kHangNs = 60'000'000'000;  // far more than anything here takes

constexpr AdamWScalars kScalars{.weight_scale = 0.99f,
                                .l2 = 0.0f,
                                .one_minus_beta1 = 0.1f,
                                .beta2 = 0.999f,
                                .one_minus_beta2 = 0.001f,
                                .step_size = 0.01f,
                                .eps = 1e-8f,
                                .maximize = false};

// One fp32 parameter with its states; the master is the working weight and what is uploaded.
struct Parameter {
  std::vector<float> gradient, master, exp_avg, exp_avg_sq, on_device;

  explicit Parameter(size_t count)
      : gradient(count), master(count), exp_avg(count), exp_avg_sq(count), on_device(count, -1.0f) {
    for (size_t i = 0; i < count; ++i) {
      const auto x = static_cast<float>(i);
      gradient[i] = std::sin(x);
      master[i] = std::cos(x);
      exp_avg[i] = 0.1f * std::sin(2 * x);
      exp_avg_sq[i] = 0.01f * std::fabs(std::cos(3 * x));
    }
  }

  UpdateSpan span() {
    return {.gradient = gradient.data(),
            .master = master.data(),
            .weight = nullptr,
            .exp_avg = exp_avg.data(),
            .exp_avg_sq = exp_avg_sq.data(),
            .count = master.size(),
            .gradient_format = FloatFormat::kFloat32,
            .weight_format = FloatFormat::kFloat32,
            .master_format = MasterFormat::kFloat32};
  }

  ParameterSlot slot(const std::string& name, bool uploaded = true) {
    return {.name = name,
            .span = span(),
            .upload_source = master.data(),
            .device_weight = uploaded ? on_device.data() : nullptr,
            .weight_bytes = master.size() * sizeof(float)};
  }

  // The same step in one call, without a pipeline.
  void update(const std::vector<Factor>& factors = {}) {
    update_states(span(), kScalars, factors.data(), factors.size(), false, active_isa());
  }

  bool same_states(const Parameter& other) const {
    return master == other.master && exp_avg == other.exp_avg && exp_avg_sq == other.exp_avg_sq;
  }
};

struct Fixture {
  std::shared_ptr<HostDevice> device;
  std::shared_ptr<TransferQueue> transfers = std::make_shared<TransferQueue>(device);
  std::unique_ptr<StepPipeline> pipeline;

  explicit Fixture(size_t chunk_elements = 1000, HostDeviceOptions options = {})
      : device(std::make_shared<HostDevice>(options)),
        pipeline(std::make_unique<StepPipeline>(transfers, chunk_elements)) {}

  Ticket submit(int64_t slot, const Parameter& parameter, const Ticket& gradient_ticket = {},
                std::vector<PendingFactor> factors = {}) {
    return pipeline->submit({{.slot = slot,
                              .gradient = parameter.gradient.data(),
                              .gradient_format = FloatFormat::kFloat32,
                              .tickets = {gradient_ticket},
                              .scalars = kScalars,
                              .factors = std::move(factors),
                              .flush_denormals = false}},
                            0)[0];
  }
};

Ticket failed_ticket() {
  const Ticket ticket = Ticket::pending();
  ticket.fail(std::make_exception_ptr(Error(ErrorKind::kDevice, "the link is down")));
  return ticket;
}

void chunks_give_the_bits_of_one_update() {
  for (const size_t count : {size_t{1}, size_t{1000}, size_t{70001}}) {
    for (const size_t chunk : {size_t{333}, size_t{40000}, size_t{1} << 20}) {
      Parameter parameter(count), expected(count);
      Fixture f(chunk);
      const int64_t slot = f.pipeline->add_slot(parameter.slot("w"));
      f.pipeline->wait({f.submit(slot, parameter)});
      expected.update();
      CHECK(parameter.same_states(expected));
      CHECK(parameter.on_device == expected.master);
      CHECK_EQ(f.transfers->stats().to_device_count, (count + chunk - 1) / chunk);
      CHECK_EQ(f.transfers->stats().to_device_bytes, count * sizeof(float));
    }
  }
}

void updates_go_on_while_the_lane_is_held() {
  Fixture f(100);
  Parameter a(250), b(250), resident(50), expected(250);
  f.device->hold(Direction::kToDevice);
  const int64_t slot_a = f.pipeline->add_slot(a.slot("a"));
  const int64_t slot_b = f.pipeline->add_slot(b.slot("b"));
  const int64_t slot_resident = f.pipeline->add_slot(resident.slot("resident", false));
  const Ticket ticket_a = f.submit(slot_a, a);
  const Ticket ticket_b = f.submit(slot_b, b);
  // Done although it comes last: it uploads nothing, so it ends with its update.
  f.submit(slot_resident, resident).wait();
  expected.update();
  CHECK(a.same_states(expected) && b.same_states(expected));
  CHECK(!ticket_a.done() && !ticket_b.done());
  CHECK(a.on_device == std::vector<float>(250, -1.0f));
  CHECK_EQ(f.device->pending_count(Direction::kToDevice), 6u);
  CHECK_EQ(f.pipeline->stats().blocked_ns, 0u);
  CHECK(!f.pipeline->wait({ticket_a}, 0));
  f.device->release(Direction::kToDevice);
  CHECK(f.pipeline->wait({ticket_a, ticket_b}));
  CHECK(a.on_device == expected.master && b.on_device == expected.master);
  CHECK_EQ(f.pipeline->stats().job_count, 3u);
  const uint64_t blocked_ns = f.pipeline->stats().blocked_ns;
  f.pipeline->wait({ticket_a, ticket_b});
  CHECK_EQ(f.pipeline->stats().blocked_ns, blocked_ns);  // nothing was pending: nothing is counted
}

void waiting_for_an_upload_exposes_no_update() {
  Fixture f(100);
  Parameter a(250), resident(50);
  f.device->hold(Direction::kToDevice);
  const Ticket ticket = f.submit(f.pipeline->add_slot(a.slot("a")), a);
  f.submit(f.pipeline->add_slot(resident.slot("resident", false)), resident)
      .wait();  // both updates have ended
  CHECK(!f.pipeline->wait({ticket}, 1'000'000));
  CHECK(f.pipeline->stats().blocked_ns >= 1'000'000u);
  CHECK_EQ(f.pipeline->stats().exposed_ns, 0u);
  CHECK(f.pipeline->stats().update_ns > 0u);
  f.device->release(Direction::kToDevice);
  CHECK(f.pipeline->wait({ticket}));
}

void jobs_of_one_slot_run_in_order() {
  Fixture f;
  Parameter parameter(500), expected(500);
  const int64_t slot = f.pipeline->add_slot(parameter.slot("w"));
  const Ticket gate = Ticket::pending();
  const float half = 0.5f;
  const Ticket first = f.submit(slot, parameter, gate);
  const Ticket second = f.submit(slot, parameter, {}, {{FactorKind::kMultiply, nullptr, half}});
  CHECK(!second.done());  // though its own gradient is there
  gate.complete();
  f.pipeline->wait({first, second});
  expected.update();
  expected.update({{FactorKind::kMultiply, half}});
  CHECK(parameter.same_states(expected));
}

void an_update_waits_for_the_slots_last_upload() {
  Fixture f;
  Parameter parameter(500), once(500), other(10);
  const int64_t slot = f.pipeline->add_slot(parameter.slot("w"));
  const int64_t other_slot = f.pipeline->add_slot(other.slot("other", false));
  f.device->hold(Direction::kToDevice);
  const Ticket first = f.submit(slot, parameter);
  f.submit(other_slot, other).wait();  // the sequencer is past the first job
  const Ticket second = f.submit(slot, parameter);
  once.update();
  // What the first job uploads must be its own result, not the second's.
  bool own_result = false;
  first.on_end([&](const std::exception_ptr&) { own_result = parameter.on_device == once.master; });
  CHECK(!second.wait(10'000'000));  // time for an update that does not wait to show
  CHECK(parameter.same_states(once));
  f.device->release(Direction::kToDevice);
  f.pipeline->wait({first, second});
  CHECK(own_result);
  once.update();
  CHECK(parameter.on_device == once.master);
}

void factors_are_read_when_the_job_runs() {
  Fixture f;
  Parameter parameter(500), expected(500);
  const int64_t slot = f.pipeline->add_slot(parameter.slot("w"));
  float coefficient = 1.0f;
  f.pipeline->hold();
  const Ticket ticket = f.submit(
      slot, parameter, {}, {{FactorKind::kMultiply, &coefficient, 0.0f}, {FactorKind::kDivide, nullptr, 3}});
  coefficient = 0.125f;
  f.pipeline->release();
  f.pipeline->wait({ticket});
  expected.update({{FactorKind::kMultiply, 0.125f}, {FactorKind::kDivide, 3}});
  CHECK(parameter.same_states(expected));
}

void a_failed_gradient_touches_nothing_and_stops_the_pipeline() {
  Fixture f;
  Parameter before(500), parameter(500), later(500);
  const int64_t slot = f.pipeline->add_slot(parameter.slot("layers.3/weight"));
  const int64_t later_slot = f.pipeline->add_slot(later.slot("layers.4/weight"));
  f.pipeline->hold();
  const Ticket bad = f.submit(slot, parameter, failed_ticket());
  const Ticket behind = f.submit(later_slot, later);
  f.pipeline->release();
  const std::string message = "parameter 'layers.3/weight': its gradient did not arrive: the link is down";
  CHECK_THROWS(ErrorKind::kDevice, message, f.pipeline->wait({bad}));
  CHECK_THROWS(ErrorKind::kDevice, message, f.pipeline->wait({behind}));
  CHECK(parameter.same_states(before) && later.same_states(before));
  CHECK(parameter.on_device == std::vector<float>(500, -1.0f));
  CHECK_THROWS(ErrorKind::kState, message, f.submit(later_slot, later));
}

void a_failure_leaves_earlier_jobs_alone() {
  Fixture f;
  Parameter good(300), bad(300);
  const int64_t good_slot = f.pipeline->add_slot(good.slot("good"));
  const int64_t bad_slot = f.pipeline->add_slot(bad.slot("bad"));
  f.device->hold(Direction::kToDevice);
  const Ticket earlier = f.submit(good_slot, good);  // ends after the failure, and well
  CHECK_THROWS(ErrorKind::kDevice, "'bad'", f.submit(bad_slot, bad, failed_ticket()).wait());
  f.device->release(Direction::kToDevice);
  CHECK(earlier.wait());
}

void a_failed_upload_of_any_chunk_fails_its_job_and_the_later_ones() {
  Fixture f(100);
  Parameter good(300), bad(300), behind(300);
  const int64_t slots[] = {f.pipeline->add_slot(good.slot("good")), f.pipeline->add_slot(bad.slot("bad")),
                           f.pipeline->add_slot(behind.slot("behind"))};
  f.device->hold(Direction::kToDevice);
  f.device->fail_copy(Direction::kToDevice, 4);  // the first of three chunks of the second job
  const Ticket tickets[] = {f.submit(slots[0], good), f.submit(slots[1], bad), f.submit(slots[2], behind)};
  f.device->release(Direction::kToDevice);
  CHECK(tickets[0].wait() && StepPipeline::weight(tickets[0]).wait());
  CHECK_THROWS(ErrorKind::kDevice, "parameter 'bad': its upload failed: copy 4",
               StepPipeline::weight(tickets[1]).wait());
  CHECK_THROWS(ErrorKind::kDevice, "parameter 'bad': its upload failed: copy 4", tickets[1].wait());
  CHECK_THROWS(ErrorKind::kDevice, "parameter 'bad'", tickets[2].wait());
  CHECK_THROWS(ErrorKind::kState, "parameter 'bad'", f.submit(slots[0], good));
}

// Parameters a, b, ... of 300 elements, one chunk each, and their jobs of one step.
struct SmallOnes {
  std::vector<Parameter> parameters;
  std::vector<int64_t> slots;
  std::vector<StepJob> jobs;

  SmallOnes(Fixture& f, size_t count) : parameters(count, Parameter(300)) {
    for (size_t i = 0; i < count; ++i) {
      slots.push_back(f.pipeline->add_slot(parameters[i].slot(std::string(1, static_cast<char>('a' + i)))));
      jobs.push_back({.slot = slots[i],
                      .gradient = parameters[i].gradient.data(),
                      .gradient_format = FloatFormat::kFloat32,
                      .tickets = {},
                      .scalars = kScalars,
                      .factors = {},
                      .flush_denormals = false});
    }
  }

  bool uploaded(size_t i) const { return parameters[i].on_device == parameters[i].master; }
};

void small_uploads_go_together() {
  Fixture f;
  SmallOnes small(f, 20);
  Parameter expected(300);
  expected.update();
  f.device->hold(Direction::kToDevice);
  const std::vector<Ticket> tickets = f.pipeline->submit(small.jobs, 0);
  Parameter last(10);
  f.submit(f.pipeline->add_slot(last.slot("last", false)), last).wait();
  // 16 are enough for a submission of their own; the others' comes when nothing is left to do.
  while (f.device->pending_count(Direction::kToDevice) < 2) std::this_thread::yield();
  CHECK_EQ(f.device->pending_count(Direction::kToDevice), 2u);
  f.device->release(Direction::kToDevice);
  CHECK(f.pipeline->wait(tickets));
  for (size_t i = 0; i < 20; ++i) CHECK(small.uploaded(i) && small.parameters[i].same_states(expected));
  CHECK_EQ(f.transfers->stats().to_device_count, 20u);
}

void a_small_upload_waits_for_no_gradient_and_no_long_update() {
  Fixture f;
  SmallOnes small(f, 2);
  Parameter large(1001);
  const Ticket gate = Ticket::pending();
  small.jobs[1].tickets = {gate};
  const std::vector<Ticket> tickets = f.pipeline->submit(small.jobs, 0);
  CHECK(tickets[0].wait(kHangNs));  // though the sequencer waits for the second's gradient
  CHECK(small.uploaded(0));
  const Ticket behind = f.submit(f.pipeline->add_slot(large.slot("large")), large);
  f.device->hold(Direction::kToDevice);
  gate.complete();
  while (f.device->pending_count(Direction::kToDevice) < 3) std::this_thread::yield();
  bool first = false;
  tickets[1].on_end([&](const std::exception_ptr&) { first = large.on_device[0] == -1.0f; });
  f.device->release(Direction::kToDevice);
  CHECK(f.pipeline->wait({tickets[1], behind}));
  CHECK(first);  // before any chunk of the large one
}

void a_slot_is_updated_again_while_its_upload_would_wait_for_others() {
  Fixture f;
  SmallOnes small(f, 1);
  Parameter expected(300);
  const std::vector<Ticket> tickets = f.pipeline->submit({small.jobs[0], small.jobs[0]}, 0);
  CHECK(f.pipeline->wait(tickets, kHangNs));
  expected.update();
  expected.update();
  CHECK(small.parameters[0].same_states(expected) && small.uploaded(0));
}

void a_failed_batch_fails_each_of_its_jobs() {
  Fixture f;
  SmallOnes small(f, 3);
  f.device->fail_copy(Direction::kToDevice, 1);
  const std::vector<Ticket> tickets = f.pipeline->submit(small.jobs, 0);
  for (const Ticket& ticket : tickets) {
    CHECK_THROWS(ErrorKind::kDevice, "parameter 'a': its upload failed: copy 1", ticket.wait());
  }
  CHECK_THROWS(ErrorKind::kState, "parameter 'a'", f.pipeline->submit(small.jobs, 0));
}

void destruction_sends_what_waits_for_others() {
  Fixture f;
  SmallOnes small(f, 3);
  const std::vector<Ticket> tickets = f.pipeline->submit(small.jobs, 0);
  f.pipeline.reset();
  for (size_t i = 0; i < 3; ++i) CHECK(tickets[i].done() && !tickets[i].error() && small.uploaded(i));
}

void illegal_jobs_are_refused_as_a_whole() {
  Fixture f;
  Parameter parameter(500), before(500);
  const int64_t slot = f.pipeline->add_slot(parameter.slot("w"));
  const StepJob good{.slot = slot,
                     .gradient = parameter.gradient.data(),
                     .gradient_format = FloatFormat::kFloat32,
                     .tickets = {},
                     .scalars = kScalars,
                     .factors = {},
                     .flush_denormals = false};
  StepJob unknown = good, null = good;
  unknown.slot = 9;
  null.gradient = nullptr;
  CHECK_THROWS(ErrorKind::kInvalidArgument, "slot 9 does not exist", f.pipeline->submit({good, unknown}, 0));
  CHECK_THROWS(ErrorKind::kInvalidArgument, "slot 'w'", f.pipeline->submit({good, null}, 0));
  f.pipeline.reset();  // finishes what was submitted: nothing
  CHECK(parameter.same_states(before));

  Fixture g;
  ParameterSlot odd = parameter.slot("odd");
  odd.weight_bytes = 3;
  CHECK_THROWS(ErrorKind::kInvalidArgument, "weight_bytes is 3 for 500 elements", g.pipeline->add_slot(odd));
  CHECK_THROWS(ErrorKind::kInvalidArgument, "chunk_elements", StepPipeline(g.transfers, 0));
}

void destruction_finishes_what_was_submitted() {
  // 20 ms of uploads: they outlast the updates, so a destructor that forgot them would show.
  Fixture f(10000, {.clock = nullptr, .to_device_bytes_per_s = 2e7});
  Parameter parameter(100000), expected(100000);
  const int64_t slot = f.pipeline->add_slot(parameter.slot("w"));
  const Ticket ticket = f.submit(slot, parameter);
  f.pipeline.reset();
  CHECK(ticket.done());
  expected.update();
  CHECK(parameter.same_states(expected));
  CHECK(parameter.on_device == expected.master);
}

void destruction_gives_up_what_cannot_end() {
  Parameter parameter(500), before(500);
  Ticket held, stuck;
  {
    Fixture f;
    const int64_t slot = f.pipeline->add_slot(parameter.slot("w"));
    f.pipeline->hold();
    held = f.submit(slot, parameter);
  }
  for (const Ticket& ticket : {held, StepPipeline::weight(held)}) {
    CHECK_THROWS(ErrorKind::kState, "parameter 'w': its update was cancelled", ticket.wait(kHangNs));
  }
  {
    Fixture f;
    const int64_t slot = f.pipeline->add_slot(parameter.slot("w"));
    stuck = f.submit(slot, parameter, Ticket::pending());
  }
  for (const Ticket& ticket : {stuck, StepPipeline::weight(stuck)}) {
    CHECK_THROWS(ErrorKind::kState, "its gradient did not arrive: the step pipeline was destroyed",
                 ticket.wait(kHangNs));
  }
  CHECK(parameter.same_states(before));
}

// Before any lock, which a thread of the parent may hold for good.
void a_forked_child_is_refused() {
  Parameter parameter(500);
  Fixture f;
  const int64_t slot = f.pipeline->add_slot(parameter.slot("w"));
  const pid_t child = fork();
  if (child == 0) {
    CHECK_THROWS(ErrorKind::kState, "forked child", f.pipeline->add_slot(parameter.slot("v")));
    CHECK_THROWS(ErrorKind::kState, "forked child", f.submit(slot, parameter));
    CHECK_THROWS(ErrorKind::kState, "forked child", f.pipeline->backup_bytes(slot));
    CHECK_THROWS(ErrorKind::kState, "forked child", f.pipeline->speculate({}, nullptr));
    CHECK_THROWS(ErrorKind::kState, "forked child", f.pipeline->discard({slot}));
    CHECK_THROWS(ErrorKind::kState, "forked child", f.pipeline->states_written(slot));
    CHECK_THROWS(ErrorKind::kState, "forked child", f.pipeline->hold());
    CHECK_THROWS(ErrorKind::kState, "forked child", f.pipeline->release());
    f.pipeline.reset();
    _exit(test::result());
  }
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  chunks_give_the_bits_of_one_update();
  updates_go_on_while_the_lane_is_held();
  waiting_for_an_upload_exposes_no_update();
  jobs_of_one_slot_run_in_order();
  an_update_waits_for_the_slots_last_upload();
  factors_are_read_when_the_job_runs();
  a_failed_gradient_touches_nothing_and_stops_the_pipeline();
  a_failure_leaves_earlier_jobs_alone();
  a_failed_upload_of_any_chunk_fails_its_job_and_the_later_ones();
  small_uploads_go_together();
  a_small_upload_waits_for_no_gradient_and_no_long_update();
  a_slot_is_updated_again_while_its_upload_would_wait_for_others();
  a_failed_batch_fails_each_of_its_jobs();
  destruction_sends_what_waits_for_others();
  illegal_jobs_are_refused_as_a_whole();
  destruction_finishes_what_was_submitted();
  destruction_gives_up_what_cannot_end();
  a_forked_child_is_refused();
  return test::result();
}
