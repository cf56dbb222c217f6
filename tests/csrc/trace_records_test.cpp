// What each floor records, and how exactly.
#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "any_device.h"
#include "base/clock.h"
#include "base/trace_ring.h"
#include "check.h"
#include "disk_directory.h"
#include "memory/host_pool.h"
#include "pipeline/step_pipeline.h"
#include "transfer/transfer_queue.h"

namespace offload {
namespace {

std::vector<TraceRecord> read_all() {
  std::vector<TraceRecord> all, part(100);
  while (const size_t count = read_trace(part)) all.insert(all.end(), part.begin(), part.begin() + count);
  return all;
}

std::vector<TraceRecord> of_lane(const std::vector<TraceRecord>& records, TraceLane lane) {
  std::vector<TraceRecord> found;
  std::copy_if(records.begin(), records.end(), std::back_inserter(found),
               [&](const TraceRecord& record) { return record.lane == lane; });
  return found;
}

void nothing_is_recorded_while_the_trace_is_off() {
  start_trace();
  stop_trace();
  test::AnyDevice any(test::DeviceKind::kCpu);
  TransferQueue queue(any.device);
  char source = 's', destination = '.';
  queue.submit(Direction::kToHost, &destination, &source, 1, 0).wait();
  HostPool pool(nullptr, {});
  pool.acquire(100, Tag::kMaster);
  CHECK(read_all().empty());
}

void copies_have_lane_bytes_and_label(test::DeviceKind kind) {
  test::AnyDevice any(kind);
  TransferQueue queue(any.device);
  char on_device[8] = {};
  start_trace();
  const int64_t before_ns = monotonic_now_ns();
  {
    const TraceLabelled traced({.name = 11, .kind = 4});
    queue.submit(Direction::kToHost, any.host_memory.data(), on_device, 8, 0).wait();
  }
  const CopySpan both[] = {{on_device, any.host_memory.data(), 2},
                           {on_device + 2, any.host_memory.data(), 3}};
  queue.submit(Direction::kToDevice, both, 0).wait();
  const int64_t after_ns = monotonic_now_ns();
  stop_trace();
  const std::vector<TraceRecord> records = read_all();
  CHECK_EQ(records.size(), size_t{2});
  if (records.size() != 2) return;
  CHECK(records[0].lane == TraceLane::kToHost && records[1].lane == TraceLane::kToDevice);
  CHECK_EQ(records[0].bytes, uint64_t{8});
  CHECK_EQ(records[1].bytes, uint64_t{5});  // of one submission
  CHECK_EQ(records[0].name, 11u);
  CHECK_EQ(static_cast<int>(records[0].kind), 4);
  CHECK_EQ(records[1].name, 0u);
  for (const TraceRecord& record : records) {
    CHECK(before_ns <= record.begin_ns && record.begin_ns <= record.end_ns && record.end_ns <= after_ns);
  }
}

// What a copy waits for is not its own time.
void a_copy_begins_when_the_lane_gets_to_it(test::DeviceKind kind) {
  test::AnyDevice any(kind);
  TransferQueue queue(any.device);
  char on_device[8] = {};
  start_trace();
  const Ticket after = Ticket::pending();
  const Ticket copied = queue.submit(Direction::kToHost, any.host_memory.data(), on_device, 8, 0, after);
  const int64_t released_ns = monotonic_now_ns();
  after.complete();
  copied.wait();
  stop_trace();
  const std::vector<TraceRecord> records = read_all();
  CHECK_EQ(records.size(), size_t{1});
  if (!records.empty()) CHECK(records[0].begin_ns >= released_ns);
}

void who_waits_for_a_copy_is_recorded(test::DeviceKind kind) {
  test::AnyDevice any(kind);
  TransferQueue queue(any.device);
  char on_device[8] = {};
  start_trace();
  const Ticket after = Ticket::pending();
  const Ticket copied = queue.submit(Direction::kToDevice, on_device, any.host_memory.data(), 8, 0, after);
  {
    const TraceLabelled traced({.name = 3});
    CHECK(!queue.wait_on_stream(0, copied, 1));  // a nanosecond
  }
  after.complete();
  copied.wait();
  CHECK(queue.wait_on_stream(0, copied));  // over: nobody waits
  stop_trace();
  const auto waits = of_lane(read_all(), TraceLane::kWait);
  CHECK_EQ(waits.size(), size_t{1});
  if (waits.empty()) return;
  CHECK_EQ(waits[0].name, 3u);
  CHECK_EQ(static_cast<int>(waits[0].kind), 1);
}

void copies_of_a_manual_clock_are_exact() {
  auto clock = std::make_shared<ManualClock>();
  HostDeviceOptions options;
  options.clock = clock;
  options.to_host_bytes_per_s = 1e9;  // a byte a nanosecond
  TransferQueue queue(std::make_shared<HostDevice>(options));
  std::vector<char> source(100), destination(100);
  start_trace();
  const Ticket first = queue.submit(Direction::kToHost, destination.data(), source.data(), 100, 0);
  const Ticket second = queue.submit(Direction::kToHost, destination.data(), source.data(), 50, 0);
  clock->advance(100);
  first.wait();
  clock->advance(50);
  second.wait();
  stop_trace();
  const std::vector<TraceRecord> records = read_all();
  CHECK_EQ(records.size(), size_t{2});
  if (records.size() != 2) return;
  CHECK_EQ(records[0].begin_ns, int64_t{0});
  CHECK_EQ(records[0].end_ns, int64_t{100});
  CHECK_EQ(records[1].begin_ns, int64_t{100});  // submitted at 0: the link was busy
  CHECK_EQ(records[1].end_ns, int64_t{150});
}

void a_failed_copy_leaves_no_record() {
  auto device = std::make_shared<HostDevice>(HostDeviceOptions{});
  TransferQueue queue(device);
  char source = 's', destination = '.';
  device->fail_copy(Direction::kToHost, 1);
  start_trace();
  CHECK_THROWS(ErrorKind::kDevice, "fail_copy",
               queue.submit(Direction::kToHost, &destination, &source, 1, 0).wait());
  stop_trace();
  CHECK(read_all().empty());
}

void the_pool_shows_every_change_by_tag() {
  HostPool pool(nullptr, {}), other(nullptr, {});
  const HostBuffer before = pool.acquire(1000, Tag::kMaster);
  start_trace();
  pool.trace_sample();
  {
    const HostBuffer buffer = pool.acquire(500, Tag::kMaster);
  }
  other.trace_sample();
  stop_trace();
  const std::vector<TraceRecord> records = read_all();
  CHECK_EQ(records.size(), 2 * kTagCount + 2);
  std::vector<uint64_t> master;
  for (const TraceRecord& record : records) {
    CHECK(record.lane == TraceLane::kHostMemory && record.begin_ns == record.end_ns);
    if (record.name == records[0].name && record.kind == static_cast<uint8_t>(Tag::kMaster)) {
      master.push_back(record.bytes);
    }
  }
  CHECK(master == (std::vector<uint64_t>{1024, 1536, 1024}));
  CHECK(records.back().name != records[0].name);
}

struct Parameter {
  std::vector<float> gradient, master, exp_avg, exp_avg_sq, on_device;
  explicit Parameter(size_t count)
      : gradient(count, 0.5f), master(count, 1.0f), exp_avg(count), exp_avg_sq(count), on_device(count) {}

  ParameterSlot slot(uint32_t trace_name) {
    return {.name = "p",
            .span = {.gradient = nullptr,
                     .master = master.data(),
                     .weight = nullptr,
                     .exp_avg = exp_avg.data(),
                     .exp_avg_sq = exp_avg_sq.data(),
                     .count = master.size(),
                     .gradient_format = FloatFormat::kFloat32,
                     .weight_format = FloatFormat::kFloat32,
                     .master_format = MasterFormat::kFloat32},
            .upload_source = master.data(),
            .device_weight = on_device.data(),
            .weight_bytes = master.size() * 4,
            .trace_name = trace_name};
  }
};

void a_step_shows_updates_uploads_and_who_waited() {
  Parameter parameter(2500);
  auto transfers = std::make_shared<TransferQueue>(std::make_shared<HostDevice>(HostDeviceOptions{}));
  StepPipeline pipeline(transfers, 1000);
  const int64_t slot = pipeline.add_slot(parameter.slot(42));
  start_trace();
  pipeline.hold();
  const std::vector<Ticket> tickets = pipeline.submit({{.slot = slot,
                                                        .gradient = parameter.gradient.data(),
                                                        .gradient_format = FloatFormat::kFloat32,
                                                        .tickets = {},
                                                        .scalars = AdamWScalars{},
                                                        .factors = {},
                                                        .flush_denormals = false}},
                                                      0);
  {
    const TraceLabelled traced({.name = 9});
    CHECK(!pipeline.wait(tickets, 1));  // a nanosecond: blocked, and recorded as such
  }
  pipeline.release();
  pipeline.wait(tickets);
  pipeline.wait(tickets);  // not blocked
  stop_trace();
  const std::vector<TraceRecord> records = read_all();
  const auto updates = of_lane(records, TraceLane::kHostUpdate);
  CHECK_EQ(updates.size(), size_t{3});  // chunks of 1000, 1000 and 500
  uint64_t update_bytes = 0;
  for (const TraceRecord& update : updates) {
    CHECK_EQ(update.name, 42u);
    update_bytes += update.bytes;
  }
  CHECK_EQ(update_bytes, uint64_t{10'000});
  const auto uploads = of_lane(records, TraceLane::kToDevice);
  CHECK_EQ(uploads.size(), size_t{3});
  for (const TraceRecord& upload : uploads) {
    CHECK_EQ(upload.name, 42u);
    CHECK_EQ(upload.kind, traced_kind(Tag::kWeights));
  }
  const auto waits = of_lane(records, TraceLane::kWait);
  CHECK(waits.size() == 1 || waits.size() == 2);  // the step may be over when the second one comes
  CHECK_EQ(waits[0].name, 9u);
}

void disk_requests_are_one_record_each(DiskBackend backend) {
  test::DiskDirectory directory;
  BlockFile file({.directories = {directory.path},
                  .block_bytes = kDiskAlignment,
                  .backend = backend,
                  .calls = test::honest_calls()});
  test::AlignedBytes memory(5 * kDiskAlignment, 'x');
  const uint64_t offset = file.allocate(5 * kDiskAlignment);
  start_trace();
  const Ticket gate = Ticket::pending();
  Ticket written;
  {
    const TraceLabelled traced({.name = 5, .kind = 1});
    written = file.submit_write_after(gate, offset, memory.data(), 5 * kDiskAlignment);
  }
  const int64_t opened_ns = monotonic_now_ns();
  gate.complete();
  written.wait();
  file.submit_read(offset, memory.data(), 5 * kDiskAlignment).wait();
  stop_trace();
  const std::vector<TraceRecord> records = read_all();
  CHECK_EQ(records.size(), size_t{2});
  if (records.size() != 2) return;
  CHECK(records[0].lane == TraceLane::kDiskWrite && records[1].lane == TraceLane::kDiskRead);
  CHECK(records[0].begin_ns >= opened_ns && records[1].begin_ns >= records[0].end_ns);
  CHECK_EQ(records[0].name, 5u);  // of who asked for it, not of who ended what it waited for
  CHECK_EQ(records[1].name, 0u);
  for (const TraceRecord& record : records) CHECK_EQ(record.bytes, uint64_t{5 * kDiskAlignment});
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  nothing_is_recorded_while_the_trace_is_off();
  for (const test::DeviceKind kind : test::kEveryDevice) {
    copies_have_lane_bytes_and_label(kind);
    a_copy_begins_when_the_lane_gets_to_it(kind);
    who_waits_for_a_copy_is_recorded(kind);
  }
  copies_of_a_manual_clock_are_exact();
  a_failed_copy_leaves_no_record();
  the_pool_shows_every_change_by_tag();
  a_step_shows_updates_uploads_and_who_waited();
  disk_requests_are_one_record_each(DiskBackend::kThreads);
  disk_requests_are_one_record_each(DiskBackend::kAuto);
  return test::result();
}
