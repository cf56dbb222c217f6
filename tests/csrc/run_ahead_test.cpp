// Streams that wait for updates on the host, over the driver double: [Note: streams that wait for the host].
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "any_device.h"
#include "base/worker_pool.h"
#include "check.h"
#include "device/cuda_stream.h"
#include "pipeline/job_end.h"
#include "pipeline/step_pipeline.h"
#include "updated_states.h"

namespace offload {
namespace {

using test::kScalars;

constexpr int64_t kHangNs = 60'000'000'000;  // far more than anything here takes
constexpr size_t kCount = 300'000;           // an update of so many is the workers'

// While it lives no update of more than one block goes on: the workers are busy.
class BusyWorkers {
 public:
  BusyWorkers() : thread_([this] { WorkerPool::shared().parallel_for(2, [this](size_t) { stay(); }); }) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return is_inside_; });
  }
  ~BusyWorkers() {
    {
      std::lock_guard lock(mutex_);
      is_over_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

 private:
  void stay() {
    std::unique_lock lock(mutex_);
    is_inside_ = true;
    changed_.notify_all();
    changed_.wait(lock, [&] { return is_over_; });
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_inside_ = false, is_over_ = false;
  std::thread thread_;
};

// An fp32 parameter whose weight on the host is its master, in memory that may be registered.
struct Parameter {
  std::vector<float> gradient, master, exp_avg, exp_avg_sq, on_device;

  explicit Parameter(size_t count = kCount)
      : gradient(count, 0.5f),
        master(count),
        exp_avg(count),
        exp_avg_sq(count, 0.25f),
        on_device(count, -1.0f) {
    for (size_t i = 0; i < count; ++i) master[i] = std::cos(static_cast<float>(i));
  }

  size_t bytes() const { return master.size() * sizeof(float); }

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

  std::vector<float> updated() const {
    Parameter copy = *this;
    update_states(copy.span(), kScalars, nullptr, 0, false, active_isa());
    return copy.master;
  }
};

struct Fixture {
  test::AnyDevice any;
  std::vector<std::unique_ptr<Parameter>> parameters;
  std::vector<int64_t> slots;
  std::shared_ptr<TransferQueue> transfers = std::make_shared<TransferQueue>(any.device);
  std::unique_ptr<StepPipeline> pipeline;

  // `resident`: the pipeline uploads the weights of these.
  explicit Fixture(size_t count, std::vector<size_t> resident = {})
      : any(test::DeviceKind::kCudaPinned),
        pipeline(std::make_unique<StepPipeline>(transfers, kDefaultChunkElements, nullptr, true)) {
    for (size_t i = 0; i < count; ++i) {
      Parameter& parameter = *parameters.emplace_back(std::make_unique<Parameter>());
      any.device->pin(parameter.master.data(), parameter.bytes());
      const bool uploaded = std::ranges::find(resident, i) != resident.end();
      slots.push_back(pipeline->add_slot({.name = std::string(1, static_cast<char>('a' + i)),
                                          .span = parameter.span(),
                                          .upload_source = parameter.master.data(),
                                          .device_weight = uploaded ? parameter.on_device.data() : nullptr,
                                          .weight_bytes = parameter.bytes()}));
    }
  }

  ~Fixture() {
    pipeline.reset();
    transfers.reset();
    for (const auto& parameter : parameters) any.device->unpin(parameter->master.data(), parameter->bytes());
  }

  StepJob job(size_t i, const Ticket& gradient = {}) {
    return {.slot = slots[i],
            .gradient = parameters[i]->gradient.data(),
            .gradient_format = FloatFormat::kFloat32,
            .tickets = {gradient},
            .scalars = kScalars,
            .factors = {},
            .flush_denormals = false};
  }

  Ticket upload(size_t i, const Ticket& update) {
    Parameter& parameter = *parameters[i];
    const CopySpan copy{parameter.on_device.data(), parameter.master.data(), parameter.bytes()};
    return transfers->submit(Direction::kToDevice, {&copy, 1}, 0, StepPipeline::weight(update));
  }
};

bool is_foreseen(const Ticket& job) { return HostWorkMark::of(StepPipeline::weight(job))->foreseen().done(); }

void wait_foreseen(const Ticket& job) {
  CHECK(HostWorkMark::of(StepPipeline::weight(job))->foreseen().wait(kHangNs));
}

bool is_issued(const Ticket& upload) {
  return static_cast<const CudaCopyMark*>(upload.mark())->issued().done();
}

size_t armed_count() { return double_calls("cuStreamWaitValue32_v2") - 1; }  // the pipeline tried it once

void uploads_of_all_that_has_landed_are_given_to_the_device_during_the_first_update() {
  Fixture f(3);
  CHECK_EQ(f.pipeline->run_ahead_refusal(), "");
  const std::vector<float> expected = f.parameters[0]->updated();
  std::vector<Ticket> uploads;
  {
    const BusyWorkers busy;
    const std::vector<Ticket> jobs = f.pipeline->submit({f.job(0), f.job(1), f.job(2)}, 0);
    for (const Ticket& job : jobs) wait_foreseen(job);
    for (size_t i = 0; i < 3; ++i) {
      uploads.push_back(f.upload(i, jobs[i]));
      CHECK(is_issued(uploads[i]) && !uploads[i].done() && !jobs[i].done());
      CHECK(f.parameters[i]->on_device[0] == -1.0f);
    }
    CHECK_EQ(armed_count(), 3u);
  }
  for (size_t i = 0; i < 3; ++i) {
    CHECK(uploads[i].wait(kHangNs));
    CHECK(f.parameters[i]->on_device == expected);
  }
}

void an_upload_waits_on_the_host_for_what_is_not_foreseen() {
  Fixture f(2);
  const Ticket gradient = Ticket::pending();
  const std::vector<Ticket> jobs = f.pipeline->submit({f.job(0), f.job(1, gradient)}, 0);
  const Ticket upload = f.upload(1, jobs[1]);
  CHECK(jobs[0].wait(kHangNs));
  CHECK(!is_foreseen(jobs[1]) && !is_issued(upload));
  CHECK_EQ(armed_count(), 0u);
  const std::vector<float> expected = f.parameters[1]->updated();
  {
    const BusyWorkers busy;
    gradient.complete();
    wait_foreseen(jobs[1]);
    while (!is_issued(upload)) std::this_thread::yield();
    CHECK_EQ(armed_count(), 1u);
    CHECK(!upload.done());
  }
  CHECK(upload.wait(kHangNs));
  CHECK(f.parameters[1]->on_device == expected);
}

// What waits for an idle device holds the driver, which an upload between two foreseen jobs would need.
void nothing_is_foreseen_behind_an_upload() {
  Fixture f(3, {1});
  std::vector<Ticket> jobs, uploads;
  std::thread freeing;
  {
    const BusyWorkers busy;
    jobs = f.pipeline->submit({f.job(0), f.job(1), f.job(2)}, 0);
    wait_foreseen(jobs[0]);
    uploads = {f.upload(0, jobs[0]), f.upload(2, jobs[2])};
    CHECK(is_issued(uploads[0]) && !is_issued(uploads[1]));
    CHECK(!is_foreseen(jobs[1]) && !is_foreseen(jobs[2]));
    std::atomic<bool> begun = false;
    freeing = std::thread([&] {
      const CudaDriver& driver = CudaDriver::load(DRIVER_DOUBLE_PATH);
      CudaPrimaryContext context(driver, 0);
      CudaPrimaryContext::Current current(context);
      begun = true;
      driver.check(driver.CtxSynchronize(), "cuCtxSynchronize");
    });
    while (!begun) std::this_thread::yield();
  }
  freeing.join();
  for (const Ticket& upload : uploads) CHECK(upload.wait(kHangNs));
  for (const Ticket& job : jobs) CHECK(job.wait(kHangNs));
  for (const auto& parameter : f.parameters) CHECK(parameter->on_device == parameter->master);
}

void nothing_is_foreseen_while_an_earlier_upload_may_fail() {
  Fixture f(2, {0});
  f.any.hold(Direction::kToDevice);
  const Ticket uploading = f.pipeline->submit({f.job(0)}, 0)[0];
  while (f.pipeline->stats().job_count == 0) std::this_thread::yield();
  const uint64_t updated_ns = f.pipeline->stats().update_ns;
  Ticket job;
  {
    const BusyWorkers busy;
    job = f.pipeline->submit({f.job(1)}, 0)[0];
    while (f.pipeline->stats().update_ns == updated_ns) std::this_thread::yield();  // until it is updated
    CHECK(!is_foreseen(job));
  }
  CHECK(job.wait(kHangNs) && !uploading.done());
  f.any.release(Direction::kToDevice);
  CHECK(uploading.wait(kHangNs));
}

void a_failed_step_lets_go_of_every_upload_and_tells_it() {
  Fixture f(2);
  const Ticket gradient = Ticket::pending();
  const std::vector<Ticket> jobs = f.pipeline->submit({f.job(0, gradient), f.job(1)}, 0);
  const Ticket uploads[] = {f.upload(0, jobs[0]), f.upload(1, jobs[1])};
  gradient.fail(std::make_exception_ptr(Error(ErrorKind::kDevice, "the link is down")));
  for (const Ticket& upload : uploads) {
    CHECK_THROWS(ErrorKind::kDevice, "parameter 'a': its gradient did not arrive", upload.wait(kHangNs));
  }
  CHECK(is_foreseen(jobs[0]) && is_foreseen(jobs[1]));
  const HostWorkMark* last = HostWorkMark::of(StepPipeline::weight(jobs[1]));
  CHECK_EQ(*last->word(), last->value());
}

void a_pipeline_that_dies_lets_go_of_every_upload() {
  Fixture f(2);
  f.pipeline->hold();
  const std::vector<Ticket> jobs = f.pipeline->submit({f.job(0), f.job(1)}, 0);
  const Ticket upload = f.upload(1, jobs[1]);
  f.pipeline.reset();
  CHECK_THROWS(ErrorKind::kState, "its update was cancelled", upload.wait(kHangNs));
  const HostWorkMark* last = HostWorkMark::of(StepPipeline::weight(jobs[1]));
  CHECK_EQ(*last->word(), last->value());
}

void the_word_outlives_the_pipeline_as_long_as_a_stream_looks_at_it() {
  Fixture f(1);
  Ticket upload;
  std::thread ending;
  {
    const BusyWorkers busy;
    Ticket job = f.pipeline->submit({f.job(0)}, 0)[0];
    wait_foreseen(job);
    upload = f.upload(0, job);
    CHECK(is_issued(upload));
    f.any.hold(Direction::kToDevice);
    ending = std::thread([&] { f.pipeline.reset(); });
  }
  ending.join();
  CHECK(double_live("registrations") == 3u);  // of the test, of the parameter, and the word's
  f.any.release(Direction::kToDevice);
  CHECK(upload.wait(kHangNs));
  f.transfers.reset();
  CHECK_EQ(double_live("registrations"), 2u);
}

void a_refused_wait_fails_the_upload_and_not_the_update() {
  Fixture f(1);
  Ticket job, upload, again;
  {
    const BusyWorkers busy;
    job = f.pipeline->submit({f.job(0)}, 0)[0];
    wait_foreseen(job);
    double_fail("cuStreamWaitValue32_v2", 1, 999, 0);
    upload = f.upload(0, job);
    CHECK_THROWS(ErrorKind::kDevice, "cuStreamWaitValue32 failed", upload.wait(kHangNs));
    again = f.upload(0, job);
    CHECK(is_issued(again) && !again.done());
  }
  CHECK(again.wait(kHangNs) && job.wait(kHangNs));
  CHECK(f.parameters[0]->on_device == f.parameters[0]->master);
}

// Who holds a pipeline may go on to free device memory, and nobody would release it then.
void a_held_pipeline_ends_what_is_foreseen() {
  Fixture f(3);
  std::vector<Ticket> jobs;
  Ticket upload, last;
  {
    const BusyWorkers busy;
    jobs = f.pipeline->submit({f.job(0), f.job(1)}, 0);
    wait_foreseen(jobs[1]);
    upload = f.upload(1, jobs[1]);
    CHECK(is_issued(upload));
    f.pipeline->hold();
    last = f.pipeline->submit({f.job(2)}, 0)[0];
  }
  CHECK(upload.wait(kHangNs) && jobs[1].wait(kHangNs));
  CHECK(f.parameters[1]->on_device == f.parameters[1]->master);
  CHECK(!is_foreseen(last) && !last.done());
  f.pipeline->release();
  CHECK(last.wait(kHangNs));
}

// The stream looks at it when it has come there, whatever became of the copy behind it.
void the_word_outlives_the_pipeline_where_its_upload_was_not_sent() {
  Fixture f(1);
  f.any.hold(Direction::kToHost);
  const Ticket before = f.transfers->submit(Direction::kToHost, f.any.host_memory.data(),
                                            f.parameters[0]->on_device.data(), 256, 0);
  const Ticket broken = Ticket::pending();
  broken.fail(std::make_exception_ptr(Error(ErrorKind::kDevice, "the link is down")));
  const std::unique_ptr<Stream> stream = f.any.device->create_stream("uploads");
  Ticket upload;
  {
    const BusyWorkers busy;
    const Ticket job = f.pipeline->submit({f.job(0)}, 0)[0];
    wait_foreseen(job);
    for (const Ticket& ticket : {before, StepPipeline::weight(job), broken}) {
      f.any.device->wait_ticket(*stream, ticket);
    }
    Parameter& parameter = *f.parameters[0];
    const CopySpan copy{parameter.on_device.data(), parameter.master.data(), parameter.bytes()};
    upload = f.any.device->submit_copies(*stream, Direction::kToDevice, {&copy, 1});
    CHECK_EQ(armed_count(), 1u);
  }
  f.pipeline.reset();
  CHECK_EQ(double_live("registrations"), 3u);  // of the test, of the parameter, and the word's
  f.any.release(Direction::kToHost);
  CHECK_THROWS(ErrorKind::kDevice, "the link is down", upload.wait(kHangNs));
  CHECK(f.parameters[0]->on_device[0] == -1.0f);
}

// The driver may read a pageable source in the call, whatever the stream waits for.
void a_pageable_upload_waits_on_the_host() {
  Fixture f(1);
  Parameter& parameter = *f.parameters[0];
  f.any.device->unpin(parameter.master.data(), parameter.bytes());
  Ticket upload;
  {
    const BusyWorkers busy;
    const Ticket job = f.pipeline->submit({f.job(0)}, 0)[0];
    wait_foreseen(job);
    upload = f.upload(0, job);
    CHECK(!is_issued(upload));
  }
  CHECK(upload.wait(kHangNs));
  CHECK_EQ(armed_count(), 0u);
  CHECK(parameter.on_device == parameter.master);
  f.any.device->pin(parameter.master.data(), parameter.bytes());
}

void a_pipeline_says_why_no_stream_waits() {
  const auto refusal = [](test::DeviceKind kind, auto prepare) {
    const test::AnyDevice any(kind);
    prepare();
    const auto transfers = std::make_shared<TransferQueue>(any.device);
    const StepPipeline pipeline(transfers, kDefaultChunkElements, nullptr, true);
    return pipeline.run_ahead_refusal();
  };
  const auto says = [&](const std::string& text, const std::string& part) {
    if (text.find(part) == std::string::npos) test::report_failure(__FILE__, __LINE__, text);
  };
  using enum test::DeviceKind;
  says(refusal(kCpu, [] {}), "threads of the host");
  says(refusal(kCudaPinned, [] { double_fail("cuMemHostRegister_v2", 1, 2, 0); }), "not page-locked");
  says(refusal(kCudaPinned, [] { double_fail("cuStreamWaitValue32_v2", 1, 801, 0); }),
       "cuStreamWaitValue32 failed: CUDA_ERROR_NOT_SUPPORTED");
  constexpr int kCanUseHostPointer = 91;
  says(refusal(kCudaPinned, [] { double_set_attribute(kCanUseHostPointer, 0); }), "at the host's addresses");
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  setenv("OFFLOAD_NUM_THREADS", "2", 1);  // fewer would leave nobody to keep busy
  uploads_of_all_that_has_landed_are_given_to_the_device_during_the_first_update();
  an_upload_waits_on_the_host_for_what_is_not_foreseen();
  nothing_is_foreseen_behind_an_upload();
  nothing_is_foreseen_while_an_earlier_upload_may_fail();
  a_failed_step_lets_go_of_every_upload_and_tells_it();
  a_pipeline_that_dies_lets_go_of_every_upload();
  the_word_outlives_the_pipeline_as_long_as_a_stream_looks_at_it();
  a_refused_wait_fails_the_upload_and_not_the_update();
  a_held_pipeline_ends_what_is_foreseen();
  the_word_outlives_the_pipeline_where_its_upload_was_not_sent();
  a_pageable_upload_waits_on_the_host();
  a_pipeline_says_why_no_stream_waits();
  return test::result();
}
