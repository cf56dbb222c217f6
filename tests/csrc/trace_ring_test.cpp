#include "base/trace_ring.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <latch>
#include <map>
#include <thread>
#include <vector>

#include "check.h"

namespace offload {
namespace {

TraceRecord numbered(uint32_t thread, int64_t number) {
  return {.begin_ns = number,
          .end_ns = number + 1,
          .bytes = static_cast<uint64_t>(number) * 2,
          .name = thread,
          .thread = thread};
}

std::vector<TraceRecord> read_all() {
  std::vector<TraceRecord> all, part(100);
  while (const size_t count = read_trace(part)) all.insert(all.end(), part.begin(), part.begin() + count);
  return all;
}

void records_come_out_as_they_went_in() {
  TraceRing ring(4);
  TraceRecord out[8];
  for (int64_t round = 0; round < 5; ++round) {  // round and round the ring
    for (int64_t i = 0; i < 3; ++i) ring.push(numbered(7, 3 * round + i));
    CHECK_EQ(ring.pop(out), size_t{3});
    for (int64_t i = 0; i < 3; ++i) CHECK_EQ(out[i].begin_ns, 3 * round + i);
    CHECK_EQ(out[2].bytes, static_cast<uint64_t>(3 * round + 2) * 2);
    CHECK_EQ(ring.pop(out), size_t{0});
  }
  CHECK_EQ(ring.lost_count(), uint64_t{0});
}

void what_does_not_fit_is_counted_and_the_rest_is_kept() {
  TraceRing ring(3);  // rounded up to 4
  for (int64_t i = 0; i < 10; ++i) ring.push(numbered(0, i));
  CHECK_EQ(ring.lost_count(), uint64_t{6});
  TraceRecord out[2];
  CHECK_EQ(ring.pop(out), size_t{2});
  CHECK_EQ(out[1].begin_ns, int64_t{1});
  ring.push(numbered(0, 10));  // there is room again
  CHECK_EQ(ring.lost_count(), uint64_t{6});
  CHECK_EQ(ring.pop(out), size_t{2});
  CHECK_EQ(out[1].begin_ns, int64_t{3});
  CHECK_EQ(ring.pop(out), size_t{1});
  CHECK_EQ(out[0].begin_ns, int64_t{10});
}

// Every record is read whole, once and in its thread's order, or is counted as lost.
void many_threads_write_while_one_reads(size_t capacity) {
  constexpr uint32_t kThreads = 8;
  constexpr int64_t kRecords = 20'000;
  TraceRing ring(capacity);
  std::atomic<uint32_t> running{kThreads};
  std::vector<std::jthread> writers;
  for (uint32_t thread = 0; thread < kThreads; ++thread) {
    writers.emplace_back([&, thread] {
      for (int64_t i = 0; i < kRecords; ++i) ring.push(numbered(thread, i));
      running.fetch_sub(1);
    });
  }
  std::map<uint32_t, int64_t> last;
  uint64_t read_count = 0, torn = 0, disordered = 0;
  TraceRecord out[64];
  for (;;) {
    const bool writing = running.load() > 0;
    const size_t count = ring.pop(out);
    for (size_t i = 0; i < count; ++i) {
      const TraceRecord& record = out[i];
      torn += record.end_ns != record.begin_ns + 1 || record.name != record.thread;
      auto [at, is_first] = last.try_emplace(record.thread, -1);
      disordered += record.begin_ns <= at->second;
      at->second = record.begin_ns;
    }
    read_count += count;
    if (count == 0 && !writing) break;
  }
  CHECK_EQ(torn, uint64_t{0});
  CHECK_EQ(disordered, uint64_t{0});
  CHECK_EQ(read_count + ring.lost_count(), uint64_t{kThreads} * kRecords);
  if (capacity >= kThreads * kRecords) CHECK_EQ(ring.lost_count(), uint64_t{0});
}

void a_new_trace_forgets_the_old() {
  CHECK(!trace_is_on());
  record_trace(TraceLane::kWait, 1, 2, 0);  // nobody has asked for a trace yet
  start_trace();
  CHECK(trace_is_on());
  record_trace(TraceLane::kHostUpdate, 3, 4, 5, {.name = 6, .kind = 7});
  std::vector<TraceRecord> records = read_all();
  CHECK_EQ(records.size(), size_t{1});
  CHECK_EQ(records[0].name, 6u);
  CHECK_EQ(static_cast<int>(records[0].kind), 7);
  CHECK(records[0].lane == TraceLane::kHostUpdate);
  CHECK_EQ(records[0].thread, static_cast<uint32_t>(gettid()));
  record_trace(TraceLane::kWait, 1, 2, 0);
  stop_trace();
  CHECK(!trace_is_on());
  start_trace();
  CHECK(read_all().empty());
  stop_trace();
}

void overflow_of_a_trace_is_its_own() {
  start_trace();
  for (int i = 0; i < (1 << 17) + 3; ++i) record_trace(TraceLane::kWait, i, i, 0);
  CHECK_EQ(trace_lost_count(), uint64_t{3});
  CHECK_EQ(read_all().size(), size_t{1} << 17);
  start_trace();
  CHECK_EQ(trace_lost_count(), uint64_t{0});
  stop_trace();
}

void threads_may_record_while_traces_come_and_go() {
  std::atomic<bool> done{false};
  std::vector<std::jthread> writers;
  for (int i = 0; i < 3; ++i) {
    writers.emplace_back([&] {
      while (!done) {
        if (trace_is_on()) record_trace(TraceLane::kToHost, 1, 2, 3);
      }
    });
  }
  for (int round = 0; round < 50; ++round) {
    start_trace();
    TraceRecord out[16];  // not all of them: the writers go on
    while (read_trace(out) == 0) std::this_thread::yield();
    stop_trace();
  }
  done = true;
}

// As the threads of two trainings do, whose steps end at once.
void several_threads_read() {
  constexpr int64_t kRecords = 1 << 16;
  for (int round = 0; round < 20; ++round) {
    start_trace();
    for (int64_t i = 0; i < kRecords; ++i) record_trace(TraceLane::kWait, i, i + 1, 0);
    std::vector<std::vector<TraceRecord>> read(2);
    {
      std::latch together(static_cast<ptrdiff_t>(read.size()));
      std::vector<std::jthread> readers;
      for (std::vector<TraceRecord>& mine : read) {
        readers.emplace_back([&] {
          together.arrive_and_wait();
          mine = read_all();
        });
      }
    }
    stop_trace();
    std::vector<int> times_read(kRecords);
    for (const std::vector<TraceRecord>& mine : read) {
      for (const TraceRecord& record : mine) ++times_read[static_cast<size_t>(record.begin_ns)];
    }
    CHECK_EQ(std::count(times_read.begin(), times_read.end(), 1), kRecords);
  }
}

void a_label_lasts_for_its_scope() {
  CHECK_EQ(trace_label().name, 0u);
  {
    const TraceLabelled outer({.name = 1, .kind = 2});
    {
      const TraceLabelled inner({.name = 3});
      CHECK_EQ(trace_label().name, 3u);
    }
    CHECK_EQ(trace_label().name, 1u);
    std::jthread([] { CHECK_EQ(trace_label().name, 0u); });  // each thread has its own
  }
  CHECK_EQ(trace_label().name, 0u);
}

void a_forked_child_starts_without_a_trace() {
  start_trace();
  record_trace(TraceLane::kWait, 1, 2, 0);
  const pid_t child = fork();
  if (child == 0) {
    bool right = !trace_is_on() && read_all().empty() && trace_lost_count() == 0;
    start_trace();  // its own
    record_trace(TraceLane::kWait, 3, 4, 0);
    const std::vector<TraceRecord> own = read_all();
    right = right && own.size() == 1 && own[0].begin_ns == 3;
    _exit(right ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(trace_is_on());
  CHECK_EQ(read_all().size(), size_t{1});
  stop_trace();
}

}  // namespace
}  // namespace offload

int main() {
  using namespace offload;
  records_come_out_as_they_went_in();
  what_does_not_fit_is_counted_and_the_rest_is_kept();
  many_threads_write_while_one_reads(64);
  many_threads_write_while_one_reads(size_t{1} << 18);
  a_new_trace_forgets_the_old();
  overflow_of_a_trace_is_its_own();
  threads_may_record_while_traces_come_and_go();
  several_threads_read();
  a_label_lasts_for_its_scope();
  a_forked_child_starts_without_a_trace();
  return test::result();
}
