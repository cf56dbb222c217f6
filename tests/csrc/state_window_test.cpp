#include "pipeline/state_window.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "device/host_device.h"
#include "disk_directory.h"
#include "pipeline/step_pipeline.h"

namespace offload {
namespace {

using test::DiskDirectory;
using test::honest_calls;

constexpr AdamWScalars kScalars{.weight_scale = 0.99f,
                                .l2 = 0.0f,
                                .one_minus_beta1 = 0.1f,
                                .beta2 = 0.999f,
                                .one_minus_beta2 = 0.001f,
                                .step_size = 0.01f,
                                .eps = 1e-8f,
                                .maximize = false};
constexpr size_t kChunkElements = 1024;
constexpr int64_t kHangNs = 60'000'000'000;  // far more than anything here takes

// One fp32 parameter, whose states are in memory for reference.
struct Parameter {
  std::vector<float> gradient, master, exp_avg, exp_avg_sq, on_device;

  explicit Parameter(size_t count)
      : gradient(count), master(count), exp_avg(count), exp_avg_sq(count), on_device(count, -1.0f) {
    for (size_t i = 0; i < count; ++i) {
      gradient[i] = std::sin(static_cast<float>(i));
      master[i] = std::cos(static_cast<float>(i));
    }
  }

  void update() {
    const UpdateSpan span{.gradient = gradient.data(),
                          .master = master.data(),
                          .weight = nullptr,
                          .exp_avg = exp_avg.data(),
                          .exp_avg_sq = exp_avg_sq.data(),
                          .count = master.size(),
                          .gradient_format = FloatFormat::kFloat32,
                          .weight_format = FloatFormat::kFloat32,
                          .master_format = MasterFormat::kFloat32};
    update_states(span, kScalars, nullptr, 0, false, active_isa());
  }
};

void write_states(BlockFile& file, const Parameter& parameter, const StateLayout& layout, uint64_t offset) {
  for (size_t index = 0; index < layout.chunk_count(); ++index) {
    const StateChunk chunk = layout.chunk(index);
    test::AlignedBytes bytes(chunk.bytes);
    const std::vector<float>* const arrays[] = {&parameter.master, &parameter.exp_avg, &parameter.exp_avg_sq};
    for (size_t array = 0; array < kStateArrayCount; ++array) {
      std::memcpy(bytes.data() + chunk.array_offsets[array], arrays[array]->data() + chunk.begin,
                  chunk.count * sizeof(float));
    }
    file.submit_write(offset + chunk.offset, bytes.data(), chunk.bytes).wait();
  }
}

ParameterSlot on_disk(const std::string& name, Parameter& parameter, const StateLayout& layout,
                      uint64_t offset) {
  return {.name = name,
          .span = {.gradient = nullptr,
                   .master = nullptr,
                   .weight = nullptr,
                   .exp_avg = nullptr,
                   .exp_avg_sq = nullptr,
                   .count = parameter.master.size(),
                   .gradient_format = FloatFormat::kFloat32,
                   .weight_format = FloatFormat::kFloat32,
                   .master_format = MasterFormat::kFloat32},
          .upload_source = nullptr,
          .device_weight = parameter.on_device.data(),
          .weight_bytes = parameter.master.size() * sizeof(float),
          .on_disk = StatesOnDisk{layout, offset}};
}

StepJob job_of(int64_t slot, const Parameter& parameter) {
  return {.slot = slot,
          .gradient = parameter.gradient.data(),
          .gradient_format = FloatFormat::kFloat32,
          .tickets = {},
          .scalars = kScalars,
          .factors = {},
          .flush_denormals = false};
}

// Writes that begin while they are held end when they are released.
class HeldWrites final : public SystemCalls {
 public:
  int file_system(int file, struct statfs* facts) override {
    const int result = SystemCalls::file_system(file, facts);
    facts->f_type = test::kExt4;  // passes for a disk, wherever the test runs
    return result;
  }
  ssize_t pwrite(int file, const void* source, size_t bytes, off_t offset) override {
    held_.wait(true);
    return SystemCalls::pwrite(file, source, bytes, offset);
  }
  void hold() { held_ = true; }
  void release() {
    held_ = false;
    held_.notify_all();
  }

 private:
  std::atomic<bool> held_ = false;
};

struct Fixture {
  DiskDirectory directory;
  std::shared_ptr<FailingSystemCalls> calls = honest_calls();
  std::shared_ptr<HostDevice> device = std::make_shared<HostDevice>(HostDeviceOptions());
  std::shared_ptr<TransferQueue> transfers = std::make_shared<TransferQueue>(device);
  HostPool pool{device, HostPoolOptions()};
  std::shared_ptr<BlockFile> file;
  std::unique_ptr<StepPipeline> pipeline;

  explicit Fixture(size_t frame_count, DiskBackend backend = DiskBackend::kAuto)
      : file(std::make_shared<BlockFile>(BlockFileOptions{.directories = {directory.path},
                                                          .block_bytes = kDiskAlignment,
                                                          .backend = backend,
                                                          .calls = calls})) {
    auto window = std::make_shared<StateWindow>(file, pool, 12 * kChunkElements, frame_count);
    pipeline = std::make_unique<StepPipeline>(transfers, kDefaultChunkElements, std::move(window));
  }

  // Its states go to disk as they are, chunk by chunk.
  int64_t add(const std::string& name, Parameter& parameter) {
    const StateLayout layout({4, 4, 4}, parameter.master.size(), kChunkElements, kDiskAlignment);
    const uint64_t offset = file->allocate(layout.bytes());
    write_states(*file, parameter, layout, offset);
    return pipeline->add_slot(on_disk(name, parameter, layout, offset));
  }

  std::vector<Ticket> step(const std::vector<int64_t>& slots, const std::vector<Parameter>& parameters,
                           bool backwards) {
    std::vector<StepJob> jobs;
    for (size_t i = 0; i < slots.size(); ++i) {
      jobs.push_back(job_of(slots[i], parameters[i]));
    }
    if (backwards) std::reverse(jobs.begin(), jobs.end());
    return pipeline->submit(std::move(jobs), 0, backwards);
  }
};

std::vector<Parameter> parameters_of_many_sizes() {
  std::vector<Parameter> parameters;
  for (size_t count : {5000, 1, 1024, 1025, 77, 4096}) parameters.emplace_back(count);
  return parameters;
}

void steps_give_the_bits_of_states_in_memory(size_t frame_count) {
  Fixture fixture(frame_count);
  std::vector<Parameter> parameters = parameters_of_many_sizes();
  std::vector<int64_t> slots;
  for (Parameter& parameter : parameters) slots.push_back(fixture.add("p", parameter));
  std::vector<Ticket> tickets;
  for (int step = 0; step < 6;
       ++step) {  // nothing is waited for in between: steps follow one another in the window
    tickets = fixture.step(slots, parameters, step % 2 == 1);
    for (Parameter& parameter : parameters) parameter.update();
  }
  CHECK(fixture.pipeline->wait(tickets));
  for (const Parameter& parameter : parameters) CHECK(parameter.on_device == parameter.master);
  const WindowStats stats = fixture.pipeline->stats().window;
  CHECK(stats.read_bytes + stats.kept_bytes == stats.written_bytes);
  CHECK(stats.kept_bytes > 0);
}

void a_weight_does_not_wait_for_the_writes_of_its_states() {
  constexpr size_t kCount = 2 * kChunkElements;
  Parameter parameter(kCount), expected(kCount);
  expected.update();
  const auto calls = std::make_shared<HeldWrites>();
  const DiskDirectory directory;
  const auto device = std::make_shared<HostDevice>();
  HostPool pool(device, HostPoolOptions());
  const auto file = std::make_shared<BlockFile>(BlockFileOptions{.directories = {directory.path},
                                                                 .block_bytes = kDiskAlignment,
                                                                 .backend = DiskBackend::kThreads,
                                                                 .calls = calls});
  StepPipeline pipeline(std::make_shared<TransferQueue>(device), kDefaultChunkElements,
                        std::make_shared<StateWindow>(file, pool, 12 * kChunkElements, 2));
  const StateLayout layout({4, 4, 4}, kCount, kChunkElements, kDiskAlignment);
  const uint64_t offset = file->allocate(layout.bytes());
  write_states(*file, parameter, layout, offset);
  const int64_t slot = pipeline.add_slot(on_disk("p", parameter, layout, offset));
  calls->hold();
  const Ticket ticket = pipeline.submit({job_of(slot, parameter)}, 0)[0];
  const bool landed = pipeline.wait({StepPipeline::weight(ticket)}, kHangNs);
  const bool is_over = ticket.done();
  calls->release();
  CHECK(landed && !is_over);
  CHECK(parameter.on_device == expected.master);
  CHECK(pipeline.wait({ticket}, kHangNs));
}

void what_others_write_is_read_anew() {
  Fixture fixture(16);  // all of it fits the window
  std::vector<Parameter> parameters;
  parameters.emplace_back(3000);
  const std::vector<int64_t> slots = {fixture.add("p", parameters[0])};
  CHECK(fixture.pipeline->wait(fixture.step(slots, parameters, false)));
  for (float& value : parameters[0].master) value = 0.25f;
  write_states(*fixture.file, parameters[0], StateLayout({4, 4, 4}, 3000, kChunkElements, kDiskAlignment), 0);
  fixture.pipeline->states_written(slots[0]);
  CHECK(fixture.pipeline->wait(fixture.step(slots, parameters, true)));
  parameters[0].update();
  CHECK(parameters[0].on_device == parameters[0].master);
}

void a_failed_transfer_ends_its_job_and_all_later_ones(SystemCall call, const char* what) {
  Fixture fixture(3, DiskBackend::kThreads);
  std::vector<Parameter> parameters = parameters_of_many_sizes();
  std::vector<int64_t> slots;
  for (Parameter& parameter : parameters) slots.push_back(fixture.add("some.weight", parameter));
  fixture.calls->fail(call, 2, EIO);
  const std::vector<Ticket> tickets = fixture.step(slots, parameters, false);
  try {
    fixture.pipeline->wait(tickets);
    CHECK(false);
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::kStorage && error.system_code() == EIO);
    const std::string text = error.what();
    CHECK(text.find("parameter 'some.weight'") == 0 && text.find(what) != std::string::npos);
    CHECK(text.find("at offset") != std::string::npos);
  }
  CHECK_THROWS(ErrorKind::kState, "stopped at an earlier error", fixture.step(slots, parameters, false));
}

void a_dying_pipeline_waits_for_no_disk() {
  Fixture fixture(3);
  std::vector<Parameter> parameters = parameters_of_many_sizes();
  std::vector<int64_t> slots;
  for (Parameter& parameter : parameters) slots.push_back(fixture.add("p", parameter));
  const std::vector<Ticket> tickets = fixture.step(slots, parameters, false);
  fixture.pipeline.reset();
  for (const Ticket& ticket : tickets) ticket.wait_ended();
}

void layouts() {
  const StateLayout layout({2, 4, 0}, 2050, 1024, 4096);
  CHECK(layout.chunk_count() == 3);
  CHECK(layout.chunk(1).offset == 8192 && layout.chunk(1).bytes == 6144);
  const StateChunk last = layout.chunk(2);
  CHECK(last.begin == 2048 && last.count == 2 && last.bytes == 512);
  CHECK(last.array_offsets[1] == kStateAlignment);
  CHECK(layout.bytes() == 16384 + 512 && layout.chunk_bytes() == 6144);
  CHECK(!layout.has(StateArray::kExpAvgSq));
  const StateLayout whole({4, 4, 4}, 5, SIZE_MAX, 4096);  // all in one chunk, however large it might be
  CHECK(whole.chunk_count() == 1 && whole.chunk(0).count == 5 && whole.bytes() == 3 * kStateAlignment);
  CHECK_THROWS(ErrorKind::kInvalidArgument, "names no array", StateLayout({0, 0, 0}, 1, 1024, 4096));
  CHECK_THROWS(ErrorKind::kInvalidArgument, "chunk_elements=0", StateLayout({4, 4, 4}, 1, 0, 4096));
}

void frames_are_checked() {
  Fixture fixture(3);
  CHECK_THROWS(ErrorKind::kInvalidArgument, "of 4097 bytes",
               StateWindow(fixture.file, fixture.pool, 4097, 1));
  CHECK_THROWS(ErrorKind::kInvalidArgument, "0 frames", StateWindow(fixture.file, fixture.pool, 4096, 0));
  CHECK_THROWS(ErrorKind::kInvalidArgument, "16 frames",  // of 2^64 bytes together
               StateWindow(fixture.file, fixture.pool, size_t{1} << 60, 16));
  Parameter parameter(9000);
  UpdateSpan span{};
  span.count = 9000;
  ParameterSlot slot{.name = "large",
                     .span = span,
                     .upload_source = nullptr,
                     .device_weight = nullptr,
                     .weight_bytes = 36000,
                     .on_disk = StatesOnDisk{StateLayout({4, 4, 4}, 9000, 9000, kDiskAlignment), 0}};
  CHECK_THROWS(ErrorKind::kInvalidArgument, "a frame of the window has", fixture.pipeline->add_slot(slot));
  CHECK_THROWS(ErrorKind::kInvalidArgument, "has no window", StepPipeline(fixture.transfers).add_slot(slot));
}

}  // namespace
}  // namespace offload

int main() {
  offload::layouts();
  offload::frames_are_checked();
  for (size_t frame_count : {1, 2, 3, 5, 32}) offload::steps_give_the_bits_of_states_in_memory(frame_count);
  offload::a_weight_does_not_wait_for_the_writes_of_its_states();
  offload::what_others_write_is_read_anew();
  offload::a_failed_transfer_ends_its_job_and_all_later_ones(offload::SystemCall::kPread, "reading");
  offload::a_failed_transfer_ends_its_job_and_all_later_ones(offload::SystemCall::kPwrite, "not written");
  offload::a_dying_pipeline_waits_for_no_disk();
  return offload::test::result();
}
