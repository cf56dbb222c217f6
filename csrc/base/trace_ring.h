// What the native core did and when, for whoever draws a timeline of it: records in one ring of the process.
//
// Ownership: the ring is made by the first start_trace() and never freed: a thread that saw the trace on may
//            still write to it.
// Threads: anybody may record, at any time, and waits for nobody. Readers of the process's trace take turns;
//          a TraceRing by itself has one at a time.
// Units: nanoseconds of CLOCK_MONOTONIC (a copy on a HostDevice: of that device's clock), bytes.
// Invariants: while the trace is off, recording is a relaxed load and a branch. What does not fit is counted,
//             and only that is lost. A forked child starts with the trace off.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <type_traits>

namespace offload {

enum class TraceLane : uint8_t {
  kToHost,
  kToDevice,
  kHostUpdate,
  kDiskRead,
  kDiskWrite,
  kWait,        // a thread was blocked; kind: 0 until updates ended, 1 until a copy did
  kHostMemory,  // a sample: kind is the Tag, bytes those in use, name the number of the pool
};

// What a record is about. The names are the caller's own numbers, 0 is none.
struct TraceLabel {
  uint32_t name = 0;
  uint8_t kind = 0;  // of a copy: 1 + the Tag of its host side, 0 where that is not known
};

struct TraceRecord {
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
  uint64_t bytes = 0;
  uint32_t name = 0;
  uint32_t thread = 0;  // as the kernel numbers them
  TraceLane lane = TraceLane::kToHost;
  uint8_t kind = 0;
  uint8_t padding[6] = {};
};
static_assert(sizeof(TraceRecord) == 40 && std::is_trivially_copyable_v<TraceRecord>);

// A bounded queue of many writers and one reader. Each cell says whose turn it is: that of the writer with
// that number, or, one later, that of the reader.
class TraceRing {
 public:
  explicit TraceRing(size_t capacity);  // rounded up to a power of two

  void push(const TraceRecord& record) noexcept;
  size_t pop(std::span<TraceRecord> out) noexcept;  // the oldest ones; returns how many

  uint64_t lost_count() const noexcept { return lost_count_.load(std::memory_order_relaxed); }

 private:
  struct alignas(64) Cell {
    std::atomic<uint64_t> turn;
    TraceRecord record;
  };

  const uint64_t mask_;
  const std::unique_ptr<Cell[]> cells_;
  alignas(64) std::atomic<uint64_t> next_write_{0};
  alignas(64) uint64_t next_read_ = 0;  // the reader's
  std::atomic<uint64_t> lost_count_{0};
};

namespace detail {
extern std::atomic<bool> trace_is_on;
}

inline bool trace_is_on() noexcept { return detail::trace_is_on.load(std::memory_order_relaxed); }

// Forgets what an earlier trace left. Starting and stopping is one thread's at a time.
void start_trace();
void stop_trace() noexcept;

// As TraceRing::pop and lost_count, of the trace that was started last; by any thread.
size_t read_trace(std::span<TraceRecord> out) noexcept;
uint64_t trace_lost_count() noexcept;

// Call it where trace_is_on(). The thread is the caller's.
void record_trace(TraceLane lane, int64_t begin_ns, int64_t end_ns, uint64_t bytes,
                  TraceLabel label = {}) noexcept;

// The label of what the calling thread submits and waits for.
TraceLabel trace_label() noexcept;
void set_trace_label(TraceLabel label) noexcept;

// That label, within a scope.
class TraceLabelled {
 public:
  explicit TraceLabelled(TraceLabel label) noexcept : outer_(trace_label()) { set_trace_label(label); }
  ~TraceLabelled() { set_trace_label(outer_); }
  TraceLabelled(const TraceLabelled&) = delete;
  TraceLabelled& operator=(const TraceLabelled&) = delete;

 private:
  const TraceLabel outer_;
};

}  // namespace offload
