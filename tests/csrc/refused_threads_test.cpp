// A system that gives no more threads: what was handed in is refused as a whole, and nothing of it runs
// later.
#include <pthread.h>

#include <cstring>
#include <memory>
#include <vector>

#include "any_device.h"
#include "base/worker_pool.h"
#include "check.h"
#include "disk_directory.h"
#include "pipeline/step_pipeline.h"
#include "storage/uring.h"

namespace offload {
namespace {

// Within the scope no thread starts: its stack would not fit any address space.
class NoMoreThreads {
 public:
  NoMoreThreads() {
    pthread_getattr_default_np(&usual_);
    pthread_attr_t attributes;
    pthread_getattr_default_np(&attributes);
    pthread_attr_setstacksize(&attributes, size_t{1} << 60);
    pthread_setattr_default_np(&attributes);
    pthread_attr_destroy(&attributes);
  }
  ~NoMoreThreads() {
    pthread_setattr_default_np(&usual_);
    pthread_attr_destroy(&usual_);
  }
  NoMoreThreads(const NoMoreThreads&) = delete;
  NoMoreThreads& operator=(const NoMoreThreads&) = delete;

 private:
  pthread_attr_t usual_;
};

void a_copy_is_refused_with_its_waits(test::DeviceKind kind) {
  test::AnyDevice any(kind);
  char* const host = any.host_memory.data();
  char refused = '.', taken = '.';
  {
    const auto stream = any.device->create_stream("to_device");
    {
      const NoMoreThreads none;
      const Ticket broken = Ticket::pending();
      broken.fail(std::make_exception_ptr(Error(ErrorKind::kDevice, "broken")));
      any.device->wait_ticket(*stream, broken);
      CHECK_THROWS(ErrorKind::kState, "the thread offload-to_device",
                   any.device->submit_copy(*stream, Direction::kToDevice, &refused, host, 1));
    }
    host[0] = 'h';
    any.device->submit_copy(*stream, Direction::kToDevice, &taken, host, 1).wait();
  }
  CHECK_EQ(taken, 'h');
  CHECK_EQ(refused, '.');  // its memory may have been given to somebody else
}

void a_refused_copy_is_not_pending() {
  HostDevice device;
  const auto stream = device.create_stream("to_device");
  char from = 'a', to = '.';
  {
    const NoMoreThreads none;
    CHECK_THROWS(ErrorKind::kState, "ulimit -u",
                 device.submit_copy(*stream, Direction::kToDevice, &to, &from, 1));
  }
  CHECK_EQ(device.pending_count(Direction::kToDevice), 0u);
}

void a_job_is_refused_and_its_slot_goes_on() {
  constexpr size_t kCount = 100;
  constexpr AdamWScalars kScalars{.weight_scale = 1.0f,
                                  .l2 = 0.0f,
                                  .one_minus_beta1 = 0.1f,
                                  .beta2 = 0.999f,
                                  .one_minus_beta2 = 0.001f,
                                  .step_size = 0.01f,
                                  .eps = 1e-8f,
                                  .maximize = false};
  std::vector<float> refused(kCount, 1.0f), taken(kCount, 0.0f);
  std::vector<float> master(kCount, 2.0f), exp_avg(kCount), exp_avg_sq(kCount);
  StepPipeline pipeline(std::make_shared<TransferQueue>(std::make_shared<HostDevice>()));
  const UpdateSpan span{.gradient = nullptr,
                        .master = master.data(),
                        .weight = nullptr,
                        .exp_avg = exp_avg.data(),
                        .exp_avg_sq = exp_avg_sq.data(),
                        .count = kCount,
                        .gradient_format = FloatFormat::kFloat32,
                        .weight_format = FloatFormat::kFloat32,
                        .master_format = MasterFormat::kFloat32};
  const int64_t slot = pipeline.add_slot({.name = "w",
                                          .span = span,
                                          .upload_source = master.data(),
                                          .device_weight = nullptr,
                                          .weight_bytes = kCount * sizeof(float)});
  const auto job = [&](const std::vector<float>& gradient) {
    return StepJob{.slot = slot,
                   .gradient = gradient.data(),
                   .gradient_format = FloatFormat::kFloat32,
                   .tickets = {},
                   .scalars = kScalars,
                   .factors = {},
                   .flush_denormals = false};
  };
  std::vector<char> backup(pipeline.backup_bytes(slot));
  {
    const NoMoreThreads none;
    CHECK_THROWS(ErrorKind::kState, "the thread offload-step", pipeline.submit({job(refused)}, 0));
    CHECK_THROWS(ErrorKind::kState, "the thread offload-step",
                 pipeline.speculate(job(refused), backup.data()));
    CHECK_THROWS(ErrorKind::kState, "the thread offload-step", pipeline.discard({slot}));
  }
  CHECK(pipeline.wait(pipeline.submit({job(taken)}, 0)));
  CHECK_EQ(pipeline.stats().job_count, 1u);
  for (const float value : master) CHECK_EQ(value, 2.0f);  // a gradient of zeros moves nothing
}

void a_block_file_is_refused_and_leaves_nothing(DiskBackend backend) {
  const test::DiskDirectory directory;
  const BlockFileOptions options{
      .directories = {directory.path}, .backend = backend, .calls = test::honest_calls()};
  {
    const NoMoreThreads none;
    CHECK_THROWS(ErrorKind::kState, "the thread offload-disk", BlockFile{options});
  }
  CHECK(test::names_in(directory.path).empty());
  CHECK(test::open_scratch_files().empty());
  CHECK_EQ(BlockFile(options).facts().size(), 1u);
}

void a_loop_runs_with_the_threads_there_are() {
  WorkerPool pool(4);
  const NoMoreThreads none;
  std::vector<int> ran(100);
  pool.parallel_for(ran.size(), [&](size_t i) { ++ran[i]; });
  for (const int count : ran) CHECK_EQ(count, 1);
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  for (const test::DeviceKind kind : test::kEveryDevice) a_copy_is_refused_with_its_waits(kind);
  a_refused_copy_is_not_pending();
  a_job_is_refused_and_its_slot_goes_on();
  a_block_file_is_refused_and_leaves_nothing(DiskBackend::kThreads);
  if (uring_refusal(test::honest_calls()).empty())
    a_block_file_is_refused_and_leaves_nothing(DiskBackend::kUring);
  a_loop_runs_with_the_threads_there_are();
  return test::result();
}
