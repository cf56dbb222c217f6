#include "base/trace_ring.h"

#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>
#include <mutex>

#include "base/fork_guard.h"

namespace offload {
namespace {

// 8 MiB. A step of an 8 B model leaves about 5,000 records, and is read when it ends.
constexpr size_t kRecordCapacity = size_t{1} << 17;

struct ProcessTrace {
  const ForkGuard owner;
  TraceRing ring{kRecordCapacity};

  std::mutex reading;  // held while records are taken
  // guarded by reading
  uint64_t lost_before = 0;
};

std::atomic<ProcessTrace*> process_trace{nullptr};
thread_local TraceLabel label_of_thread;

uint32_t thread_number() noexcept {
  thread_local const auto number = static_cast<uint32_t>(syscall(SYS_gettid));
  return number;
}

}  // namespace

namespace detail {
std::atomic<bool> trace_is_on{false};
}

TraceRing::TraceRing(size_t capacity)
    : mask_(std::bit_ceil(capacity) - 1), cells_(std::make_unique<Cell[]>(mask_ + 1)) {
  for (uint64_t i = 0; i <= mask_; ++i) cells_[i].turn.store(i, std::memory_order_relaxed);
}

void TraceRing::push(const TraceRecord& record) noexcept {
  uint64_t number = next_write_.load(std::memory_order_relaxed);
  for (;;) {
    Cell& cell = cells_[number & mask_];
    const uint64_t turn = cell.turn.load(std::memory_order_acquire);
    if (turn == number) {
      if (!next_write_.compare_exchange_weak(number, number + 1, std::memory_order_relaxed)) continue;
      cell.record = record;
      cell.turn.store(number + 1, std::memory_order_release);
      return;
    }
    if (static_cast<int64_t>(turn - number) < 0) {  // the reader is a whole round behind
      lost_count_.fetch_add(1, std::memory_order_relaxed);
      return;
    }
    number = next_write_.load(std::memory_order_relaxed);
  }
}

size_t TraceRing::pop(std::span<TraceRecord> out) noexcept {
  size_t count = 0;
  for (; count < out.size(); ++count, ++next_read_) {
    Cell& cell = cells_[next_read_ & mask_];
    if (cell.turn.load(std::memory_order_acquire) != next_read_ + 1) break;
    out[count] = cell.record;
    cell.turn.store(next_read_ + mask_ + 1, std::memory_order_release);
  }
  return count;
}

void start_trace() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { detail::trace_is_on.store(false, std::memory_order_relaxed); });
  static_cast<void>(registered);
  ProcessTrace* trace = process_trace.load(std::memory_order_acquire);
  // A child's own: a writer of the parent may have been between taking a cell and filling it, for good.
  if (trace == nullptr || trace->owner.forked()) {
    trace = new ProcessTrace;
    process_trace.store(trace, std::memory_order_release);
  }
  std::lock_guard lock(trace->reading);
  TraceRecord left[64];
  while (trace->ring.pop(left) > 0) {
  }
  trace->lost_before = trace->ring.lost_count();
  detail::trace_is_on.store(true, std::memory_order_release);
}

void stop_trace() noexcept { detail::trace_is_on.store(false, std::memory_order_relaxed); }

size_t read_trace(std::span<TraceRecord> out) noexcept {
  ProcessTrace* const trace = process_trace.load(std::memory_order_acquire);
  if (trace == nullptr || trace->owner.forked()) return 0;
  std::lock_guard lock(trace->reading);
  return trace->ring.pop(out);
}

uint64_t trace_lost_count() noexcept {
  ProcessTrace* const trace = process_trace.load(std::memory_order_acquire);
  if (trace == nullptr || trace->owner.forked()) return 0;
  std::lock_guard lock(trace->reading);
  return trace->ring.lost_count() - trace->lost_before;
}

void record_trace(TraceLane lane, int64_t begin_ns, int64_t end_ns, uint64_t bytes,
                  TraceLabel label) noexcept {
  ProcessTrace* const trace = process_trace.load(std::memory_order_acquire);
  if (trace == nullptr) return;
  trace->ring.push({.begin_ns = begin_ns,
                    .end_ns = end_ns,
                    .bytes = bytes,
                    .name = label.name,
                    .thread = thread_number(),
                    .lane = lane,
                    .kind = label.kind});
}

TraceLabel trace_label() noexcept { return label_of_thread; }

void set_trace_label(TraceLabel label) noexcept { label_of_thread = label; }

}  // namespace offload
